//! How a session ended, as the remotecommand protocol tells it on its error stream: JSON of a `metav1.Status` from version 4
//! on, and plain text, of failures only, before.

use serde_json::json;

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The command ended with 0, or the attached container ended.
    Success,
    /// The command ended with another code.
    ExitCode(i32),
    /// It did not come so far.
    Failed(String),
}

impl Outcome {
    /// The bytes for the error stream.
    pub fn encode(&self, as_json: bool) -> Vec<u8> {
        if as_json { self.to_json().to_string().into_bytes() } else { self.to_text().into_bytes() }
    }

    fn to_text(&self) -> String {
        match self {
            Self::Success => String::new(),
            Self::ExitCode(code) => format!("command terminated with non-zero exit code: exit status {code}"),
            Self::Failed(message) => message.clone(),
        }
    }

    fn to_json(&self) -> serde_json::Value {
        let message = self.to_text();
        match self {
            Self::Success => json!({"metadata": {}, "status": "Success"}),
            Self::ExitCode(code) => json!({
                "metadata": {},
                "status": "Failure",
                "reason": "NonZeroExitCode",
                "message": message,
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Self::Failed(_) => json!({
                "metadata": {},
                "status": "Failure",
                "reason": "InternalError",
                "message": format!("Internal error occurred: {message}"),
                "details": {"causes": [{"message": message}]},
                "code": 500,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_a_cause_with_the_words_that_clients_look_for() {
        let status: serde_json::Value = serde_json::from_slice(&Outcome::ExitCode(3).encode(true)).expect("JSON");
        assert_eq!((&status["status"], &status["reason"]), (&json!("Failure"), &json!("NonZeroExitCode")));
        assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}));
    }

    #[test]
    fn old_protocols_get_text_and_only_of_failures() {
        assert!(Outcome::Success.encode(false).is_empty());
        assert_eq!(Outcome::Failed("no such thing".into()).encode(false), b"no such thing");
    }
}
