//! System calls as planted code makes them: by number.
#![allow(unsafe_code, reason = "planted code keeps to no rules")]

use std::ffi::CStr;

/// An argument.
pub enum Argument<'a> {
    Number(i64),
    Text(&'a CStr),
    Bytes(&'a mut [u8]),
}

/// Makes system call `call`, and gives what it returns, or its error's number.
pub fn call(call: i64, arguments: &mut [Argument<'_>]) -> Result<i64, i32> {
    let mut raw = [0i64; 6];
    for (place, argument) in raw.iter_mut().zip(arguments) {
        *place = match argument {
            Argument::Number(number) => *number,
            Argument::Text(text) => text.as_ptr() as i64,
            Argument::Bytes(bytes) => bytes.as_mut_ptr() as i64,
        };
    }
    let [a, b, c, d, e, f] = raw;
    // SAFETY: addresses among the arguments are of texts and buffers that live for the call and are as long as the call needs,
    // which each attempt sees to.
    let result = unsafe { libc::syscall(call, a, b, c, d, e, f) };
    if result < 0 { Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(-1)) } else { Ok(result) }
}

/// Ends the process.
pub fn end(status: i32) -> ! {
    // SAFETY: it takes a number and does not return.
    unsafe { libc::_exit(status) }
}
