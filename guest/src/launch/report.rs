//! How the child tells the agent why it did not come to execve.

use std::io;

use tokio::net::unix::pipe;

/// The step that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Closing what the child must not hold.
    Descriptors = 1,
    /// Giving the namespace its own `/proc`.
    Proc = 2,
    /// The init's own preparations and the fork of the command.
    Fork = 3,
    /// Session, stdio, limits.
    Process = 4,
    /// Entering the working directory.
    WorkingDirectory = 5,
    /// Becoming the user.
    User = 6,
    /// The execve.
    Exec = 7,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Descriptors,
        Self::Proc,
        Self::Fork,
        Self::Process,
        Self::WorkingDirectory,
        Self::User,
        Self::Exec,
    ];
}

/// What the child has reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// What it tried.
    pub step: Step,
    /// The kernel's answer.
    pub errno: i32,
}

const REPORT_BYTES: usize = 5;

impl Report {
    /// The report as it goes through the pipe. Runs in the child.
    pub(super) fn encode(self) -> [u8; REPORT_BYTES] {
        let [a, b, c, d] = self.errno.to_ne_bytes();
        [self.step as u8, a, b, c, d]
    }

    fn decode(bytes: [u8; REPORT_BYTES]) -> Option<Self> {
        let [step, a, b, c, d] = bytes;
        let step = Step::ALL.into_iter().find(|known| *known as u8 == step)?;
        Some(Self { step, errno: i32::from_ne_bytes([a, b, c, d]) })
    }

    /// Waits for a report, or for the pipe's end: the command was executed, or its init was killed
    /// before it could say anything.
    ///
    /// # Errors
    /// When the pipe fails.
    pub async fn read(pipe: pipe::Receiver) -> io::Result<Option<Self>> {
        let mut bytes = [0; REPORT_BYTES];
        loop {
            pipe.readable().await?;
            match pipe.try_read(&mut bytes) {
                Ok(0) => return Ok(None),
                // So small a write arrives in one piece.
                Ok(REPORT_BYTES) => match Self::decode(bytes) {
                    Some(report) => return Ok(Some(report)),
                    None => return Err(io::ErrorKind::InvalidData.into()),
                },
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_survives_the_pipe() {
        for step in Step::ALL {
            let report = Report { step, errno: -7 };
            assert_eq!(Report::decode(report.encode()), Some(report));
        }
        assert_eq!(Report::decode([0, 1, 0, 0, 0]), None);
        assert_eq!(Report::decode([8, 1, 0, 0, 0]), None);
    }
}
