//! One of the demo's VMs: QEMU with the lab's guest image, steered over its serial line.
//!
//! The guest runs [`SCRIPT`], which reads one command a line and answers each with a marker line
//! `@@LANLET done=VERB value=RESULT` (the lab's guest-image/init says what else comes marked).

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::super::{Failure, child, qemu, run::Link};
use super::progress::Progress;
use crate::network::VmmPort;

/// What the guest runs. stdin is the serial line, so that no command may read it. The file comes by nc:
/// Debian's static busybox crashes in wget, at getservbyname.
const SCRIPT: &str = r#"
ping_ms() { timeout 20 ping -c 3 -w 10 -q "$1" </dev/null | sed -n 's|^round-trip.*= [^/]*/\([^/]*\)/.*|\1|p'; }
mbits() { iperf3 -f m -t 3 -c "$@" </dev/null 2>&1 | sed -n 's|.* \([0-9.]*\) Mbits/sec.*receiver.*|\1|p'; }
fetch() { printf 'GET %s HTTP/1.0\r\n\r\n' "$2" | timeout 50 nc "$1" 80 | tail -c "$3"; }
while read -r verb argument; do
    case $verb in
    ping) value=$(ping_ms "$argument") ;;
    fetch) value=$(fetch $argument | sha256sum | cut -d' ' -f1) ;;
    serve) iperf3 -s -1 -D </dev/null >/dev/null 2>&1 && sleep 1 && value=ok ;;
    measure) value=$(mbits $argument) ;;
    end) break ;;
    esac
    say "done=$verb value=${value:-failed}"
    value=
done
"#;

/// What the lab's guests mark their lines with.
const MARK: &str = "@@LANLET ";
/// Console lines kept, to be shown if a step fails.
const CONSOLE_LINES: usize = 20;
/// How often a wait looks at the display.
const POLL: Duration = Duration::from_millis(100);
/// How long a guest may take to power off.
const POWER_OFF_TIME_MAX: Duration = Duration::from_secs(5);

/// A running VM.
pub(super) struct Guest {
    pub(super) name: &'static str,
    child: Child,
    serial: Option<ChildStdin>,
    lines: Receiver<String>,
    console: VecDeque<String>,
}

impl Guest {
    /// Boots a guest on a tap.
    ///
    /// # Errors
    /// QEMU or a file of the lab is missing.
    pub(super) fn boot(
        name: &'static str,
        lab: &Path,
        accel: &str,
        scratch: &Path,
        port: VmmPort,
    ) -> Result<Self, Failure> {
        let script = scratch.join(format!("{name}.sh"));
        std::fs::write(&script, SCRIPT).map_err(Failure::io("cannot write a guest's script"))?;
        let append = std::process::Command::new(lab.join("guest-image/append"))
            .arg(format!("lanlet.host={name}"))
            .output()
            .map_err(Failure::io("cannot run the lab's guest-image/append"))?;
        let append = String::from_utf8_lossy(&append.stdout).trim().to_owned();
        let file = |part: &str| lab.join("out").join(part).into_os_string();
        let fw_cfg = format!("name=opt/lanlet/script,file={}", script.display());
        let arguments = [
            ["-accel".into(), accel.into()],
            ["-cpu".into(), "max".into()],
            ["-m".into(), "256".into()],
            ["-no-reboot".into(), "-nodefaults".into()],
            ["-display".into(), "none".into()],
            ["-serial".into(), "stdio".into()],
            ["-kernel".into(), file("vmlinuz")],
            ["-initrd".into(), file("initrd.gz")],
            ["-append".into(), append.into()],
            ["-fw_cfg".into(), fw_cfg.into()],
            // No boot from the network: the kernel is given, and the ROM would take its time.
            ["-global".into(), "virtio-net-pci.romfile=".into()],
        ];
        let link = Link::of_tap(&port);
        let program = qemu::find()?;
        let command = qemu::command(&program, arguments.as_flattened(), &link)?;
        let mut child = child::with_fds(&command, &port.fds)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Failure::io("cannot start QEMU"))?;
        let (sender, lines) = channel();
        forward(child.stdout.take(), sender.clone())?;
        forward(child.stderr.take(), sender)?;
        let serial = child.stdin.take();
        Ok(Self {
            name,
            child,
            serial,
            lines,
            console: VecDeque::new(),
        })
    }

    /// Sends a command to the guest's script.
    ///
    /// # Errors
    /// QEMU has ended.
    pub(super) fn tell(&mut self, command: &str) -> Result<(), String> {
        let mut line = command.to_owned();
        line.push('\n');
        let serial = self.serial.as_mut().ok_or("is powered off")?;
        serial
            .write_all(line.as_bytes())
            .map_err(|error| format!("QEMU: {error}"))
    }

    /// Waits for a marked line with this key; its value.
    ///
    /// # Errors
    /// QEMU has ended, or it took too long.
    pub(super) fn wait_for(
        &mut self,
        key: &str,
        time_max: Duration,
        progress: &mut Progress,
    ) -> Result<Marks, String> {
        let begun = Instant::now();
        loop {
            progress.tick();
            match self.lines.recv_timeout(POLL) {
                Ok(line) => {
                    let marks = Marks::of(&line).filter(|marks| marks.get(key).is_some());
                    self.remember(line);
                    if let Some(marks) = marks {
                        return Ok(marks);
                    }
                }
                Err(RecvTimeoutError::Timeout) if begun.elapsed() < time_max => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("no answer within {} s", time_max.as_secs()));
                }
                Err(RecvTimeoutError::Disconnected) => return Err("QEMU has ended".to_owned()),
            }
        }
    }

    /// Waits for the answer to a command.
    ///
    /// # Errors
    /// The guest's command failed, or what [`Guest::wait_for`] says.
    pub(super) fn answer(
        &mut self,
        time_max: Duration,
        progress: &mut Progress,
    ) -> Result<String, String> {
        let marks = self.wait_for("done", time_max, progress)?;
        match marks.get("value") {
            Some("failed") | None => Err(format!(
                "{} failed in the guest",
                marks.get("done").unwrap_or("a command")
            )),
            Some(value) => Ok(value.to_owned()),
        }
    }

    /// Lets the guest power off, or pulls the plug.
    pub(super) fn end(&mut self) {
        let asked = self.tell("end").is_ok();
        let deadline = Instant::now() + POWER_OFF_TIME_MAX;
        while asked && Instant::now() < deadline && !matches!(self.child.try_wait(), Ok(Some(_))) {
            std::thread::sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The console's last lines.
    pub(super) fn console(&mut self) -> String {
        while let Ok(line) = self.lines.try_recv() {
            self.remember(line);
        }
        self.console
            .iter()
            .map(|line| format!("  {}| {line}\n", self.name))
            .collect()
    }

    fn remember(&mut self, line: String) {
        if self.console.len() == CONSOLE_LINES {
            self.console.pop_front();
        }
        self.console.push_back(line);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a stream's lines on, without what a terminal would act on.
fn forward(
    stream: Option<impl std::io::Read + Send + 'static>,
    sender: Sender<String>,
) -> Result<(), Failure> {
    let Some(stream) = stream else { return Ok(()) };
    let read = move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            let line: String = line.chars().filter(|c| !c.is_control()).collect();
            if sender.send(line).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new()
        .name("lanlet-console".to_owned())
        .spawn(read);
    thread
        .map(drop)
        .map_err(Failure::io("cannot start a thread"))
}

/// The `key=value` words of a marked line.
#[derive(Debug, PartialEq)]
pub(super) struct Marks(Vec<(String, String)>);

impl Marks {
    /// The marks of a line, if it has any. Kernel messages may stand before them.
    fn of(line: &str) -> Option<Self> {
        let (_, words) = line.split_once(MARK)?;
        let pairs = words
            .split_whitespace()
            .filter_map(|word| word.split_once('='));
        Some(Self(
            pairs
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
        ))
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks() {
        let marks = Marks::of("[ 1.0] x@@LANLET lease=10.0.0.2/24 router=10.0.0.1 odd").unwrap();
        assert_eq!(marks.get("lease"), Some("10.0.0.2/24"));
        assert_eq!(marks.get("router"), Some("10.0.0.1"));
        assert_eq!(marks.get("odd"), None);
        assert_eq!(Marks::of("plain"), None);
    }
}
