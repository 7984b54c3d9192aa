//! Fields of /proc/pid/stat (proc(5)).

/// The field of this number, at least 3. Field 2, the name, is in parentheses and may hold anything.
pub fn field(stat: &str, number: usize) -> Option<&str> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(number.checked_sub(3)?)
}
