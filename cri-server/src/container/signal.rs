//! Stop signals: as CRI numbers them, as images write them, as Linux on x86-64 knows them (signal(7)).

use super::SpecError;
use crate::cri;

const SIGTERM: u32 = 15;
const SIGRTMIN: u32 = 34;
const SIGRTMAX: u32 = 64;

const NAMES: [(&str, u32); 35] = [
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", 15),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("UNUSED", 31),
];

/// The signal that asks the container to stop: the configuration's, else the image's, else SIGTERM.
pub fn stop_signal(config: &cri::ContainerConfig, image: &str) -> Result<u32, SpecError> {
    let invalid = |problem| SpecError::Invalid { field: "stop_signal", problem };
    let name = match cri::Signal::try_from(config.stop_signal) {
        Ok(cri::Signal::RuntimeDefault) if image.is_empty() => return Ok(SIGTERM),
        Ok(cri::Signal::RuntimeDefault) => image,
        // CRI's names have PLUS and MINUS where the others have signs; `number` knows both.
        Ok(signal) => signal.as_str_name(),
        Err(_) => return Err(invalid(format!("{} is not a signal", config.stop_signal))),
    };
    number(name).ok_or_else(|| invalid(format!("{:?} is not a signal", name.chars().take(80).collect::<String>())))
}

/// The number of `15`, `SIGTERM`, `term`, `SIGRTMIN+3`, `SIGRTMAXMINUS2`, ….
fn number(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=SIGRTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    let offset = |rest: &str, sign: &str, word: &str| {
        if rest.is_empty() {
            return Some(0);
        }
        rest.strip_prefix(sign).or_else(|| rest.strip_prefix(word))?.parse::<u32>().ok().filter(|offset| *offset <= 30)
    };
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return offset(rest, "+", "PLUS").map(|offset| SIGRTMIN + offset);
    }
    offset(name.strip_prefix("RTMAX")?, "-", "MINUS").map(|offset| SIGRTMAX - offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_cri_has_a_number() {
        for value in 1..=65 {
            let config = cri::ContainerConfig { stop_signal: value, ..Default::default() };
            let number = stop_signal(&config, "").expect("known");
            assert!((1..=64).contains(&number), "{value}");
        }
        let config = cri::ContainerConfig { stop_signal: 66, ..Default::default() };
        assert!(stop_signal(&config, "").is_err());
    }

    #[test]
    fn signals_are_written_in_many_ways() {
        for (text, expected) in [
            ("SIGTERM", 15),
            ("quit", 3),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("SIGRTMINPLUS15", 49),
            ("SIGRTMAX-1", 63),
            ("SIGRTMAXMINUS14", 50),
            ("RTMAX", 64),
        ] {
            assert_eq!(number(text), Some(expected), "{text}");
        }
        for bad in ["", "SIG", "0", "65", "SIGRTMIN-1", "SIGRTMIN+31", "TERMINATE"] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_configuration_comes_before_the_image() {
        let config = cri::ContainerConfig { stop_signal: cri::Signal::Sigusr1.into(), ..Default::default() };
        assert_eq!(stop_signal(&config, "SIGQUIT"), Ok(10));
        assert_eq!(stop_signal(&cri::ContainerConfig::default(), "SIGQUIT"), Ok(3));
        assert_eq!(stop_signal(&cri::ContainerConfig::default(), ""), Ok(15));
        assert!(stop_signal(&cri::ContainerConfig::default(), "SIGNOPE").is_err());
    }
}
