//! The controller's hold of a process: one that only has to be there, or one that runs the load
//! generators and is asked over its standard input and output.

use std::fs::File;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::peer::{Reply, Request};

/// How much of what a process said last goes into a reason.
const LAST_WORDS_MAX: usize = 300;
/// How long a path may take to have a route and to answer.
const START_TIME_MAX: Duration = Duration::from_secs(8);
/// Pause between two looks at what is not ready.
pub(super) const POLL: Duration = Duration::from_millis(20);

/// A process that ends with this value.
pub(super) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it; what it says goes to the file `log`.
    pub(super) fn spawn(mut command: Command, log: PathBuf) -> Result<Self, String> {
        let file = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .stderr(file)
            .spawn()
            .map_err(|error| format!("cannot start {program}: {error}"))?;
        Ok(Self { child, log })
    }

    /// Starts one that is asked nothing.
    pub(super) fn spawn_mute(mut command: Command, log: PathBuf) -> Result<Self, String> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Self::spawn(command, log)
    }

    /// An error if it has ended.
    pub(super) fn check(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(Some(status)) => Err(format!("ended early ({status}){}", self.last_words())),
            _ => Ok(()),
        }
    }

    /// Its number.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it said last on standard error, to go behind a reason.
    pub(super) fn last_words(&self) -> String {
        last_words(&self.log)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn last_words(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let last = lines.iter().rev().find(|line| !line.is_empty());
    last.map_or_else(String::new, |line| {
        let line: String = line.chars().take(LAST_WORDS_MAX).collect();
        format!(": {line}")
    })
}

/// A process with load generators.
pub(super) struct Agent {
    process: Process,
    stdin: ChildStdin,
    stdout: ChildStdout,
    unread: Vec<u8>,
}

impl Agent {
    /// Starts the command, which has to become `lanlet bench-peer agent`.
    pub(super) fn spawn(mut command: Command, log: PathBuf) -> Result<Self, String> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(command, log)?;
        let pipes = process.child.stdin.take().zip(process.child.stdout.take());
        let (stdin, stdout) = pipes.ok_or("a process has no pipes")?;
        Ok(Self {
            process,
            stdin,
            stdout,
            unread: Vec::new(),
        })
    }

    /// Waits until it has a route to `to`; its own address there.
    pub(super) fn wait_for_route(&mut self, to: IpAddr) -> Result<IpAddr, String> {
        let begun = Instant::now();
        loop {
            match self.ask(&Request::Source { to }, START_TIME_MAX)? {
                Reply::Source(address) if !address.is_unspecified() => return Ok(address),
                Reply::Failed(error) if begun.elapsed() > START_TIME_MAX => {
                    let words = self.process.last_words();
                    return Err(format!("the guest has no route: {error}{words}"));
                }
                _ => std::thread::sleep(POLL),
            }
        }
    }

    /// Waits until it says that it listens: one whose input is lost before.
    pub(super) fn wait_until_ready(&mut self, limit: Duration) -> Result<(), String> {
        match self.hear(limit)? {
            Reply::Ready => Ok(()),
            other => Err(format!("unexpected {other:?}")),
        }
    }

    /// Asks, and waits for the reply. After an error it is of no further use.
    pub(super) fn ask(&mut self, request: &Request, limit: Duration) -> Result<Reply, String> {
        let mut line = serde_json::to_string(request).map_err(|error| error.to_string())?;
        line.push('\n');
        if self.stdin.write_all(line.as_bytes()).is_err() {
            return Err(self.ended());
        }
        self.hear(limit)
    }

    fn ended(&self) -> String {
        format!("the load generator ended{}", self.process.last_words())
    }

    fn hear(&mut self, limit: Duration) -> Result<Reply, String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(reply) = self.take_reply() {
                return Ok(reply);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("no result within {:.0} s", limit.as_secs_f64()));
            }
            let mut fds = [PollFd::new(&self.stdout, PollFlags::IN)];
            let left = Timespec::try_from(left).map_err(|error| error.to_string())?;
            if rustix::event::poll(&mut fds, Some(&left)) == Ok(1) {
                let mut buffer = [0; 4096];
                match self.stdout.read(&mut buffer) {
                    Ok(0) => return Err(self.ended()),
                    Ok(count) => self.unread.extend_from_slice(&buffer[..count]),
                    Err(error) => return Err(error.to_string()),
                }
            }
        }
    }

    /// The next whole line that is a reply. What runs the agent may print lines of its own.
    fn take_reply(&mut self) -> Option<Reply> {
        loop {
            let end = self.unread.iter().position(|&byte| byte == b'\n')?;
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            if let Ok(reply) = serde_json::from_slice(&line) {
                return Some(reply);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Agent {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let log = std::env::temp_dir().join(format!(
            "lanlet-bench-agent-{}-{}",
            std::process::id(),
            script.len()
        ));
        Agent::spawn(command, log).unwrap()
    }

    #[test]
    fn lines_that_are_no_reply_are_passed_over() {
        let mut agent = shell("read x; echo hello; echo '{\"Failed\":\"no\"}'; read x");
        let reply = agent.ask(&Request::Finish, Duration::from_secs(5));
        assert!(matches!(reply, Ok(Reply::Failed(text)) if text == "no"));
        let _ = std::fs::remove_file(&agent.process.log);
    }

    #[test]
    fn one_that_is_silent_or_ends_is_an_error() {
        let mut agent = shell("read x; sleep 5");
        let error = agent.ask(&Request::Finish, Duration::from_millis(50));
        assert!(error.unwrap_err().contains("no result"));
        let _ = std::fs::remove_file(&agent.process.log);
        let mut agent = shell("read x; echo oh >&2");
        let error = agent.ask(&Request::Finish, Duration::from_secs(5));
        assert_eq!(error.unwrap_err(), "the load generator ended: oh");
        let _ = std::fs::remove_file(&agent.process.log);
    }
}
