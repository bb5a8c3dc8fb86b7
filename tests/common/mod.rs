//! Support for the tests that run the binary: scenarios in `lab/world`, QEMU guests, time limits.
//!
//! A scenario is a shell script that runs as root of a world of its own (`lab/world` describes it),
//! with the functions of `prelude.sh`. The world itself, and everything in it, runs as an
//! unprivileged user of the machine (`lab/as-user`), and `lanlet` inside it without any right over
//! the world's network: what passes here needs no root.

// Each test binary uses its part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// How long a scenario may take unless it says otherwise.
const SCENARIO_TIME_MAX: Duration = Duration::from_secs(60);
/// Pause between two looks at a running process.
const POLL: Duration = Duration::from_millis(10);

/// Where the binary under test and the lab are, in a place that every user can enter.
pub struct Lab {
    /// `lanlet`.
    pub lanlet: PathBuf,
    /// The staged `lab/`.
    pub dir: PathBuf,
    /// Whether the guest image is there.
    pub image: bool,
}

/// Stages the binary and the lab, once. The binary is `$LANLET_BIN`, else the one cargo built for
/// this test run.
pub fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab");
        // Nothing to do when it is up to date; a failure shows as a missing image.
        let built = finish(
            Command::new(sources.join("guest-image/build")),
            Duration::from_secs(120),
        );
        let mut stage = Command::new(sources.join("stage"));
        if std::env::var_os("LANLET_BIN").is_none() {
            stage.env("LANLET_BIN", env!("CARGO_BIN_EXE_lanlet"));
        }
        let staged = finish(stage, Duration::from_secs(60)).passed();
        let root = PathBuf::from(staged.stdout.trim());
        let dir = root.join("lab");
        Lab {
            lanlet: root.join("lanlet"),
            image: built.status == Some(0) && dir.join("out/initrd.gz").exists(),
            dir,
        }
    })
}

/// What `tool`, like `sha256sum`, makes of `bytes` of the pattern on the host.
pub fn pattern_hash(bytes: u64, tool: &str) -> String {
    let mut command = Command::new("bash");
    let pattern = lab().dir.join("pattern");
    command.args(["-c", "\"$1\" \"$2\" | \"$3\" | cut -d' ' -f1", "bash"]);
    command.arg(pattern).args([&bytes.to_string(), tool]);
    let hashed = finish(command, Duration::from_secs(120)).passed();
    hashed.stdout.trim().to_owned()
}

/// Says loudly that a test did not run, and why; in CI that is a failure.
///
/// libtest swallows what a passing test prints, so this writes past it.
pub fn skip(reason: &str) {
    let name = thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {reason}");
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "skipped in CI: {reason}"
    );
}

/// Why scenarios can't run on this machine, if they can't.
pub fn world_missing() -> Option<String> {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    MISSING
        .get_or_init(|| {
            let tried = World::new().limit(Duration::from_secs(20)).run("true");
            (tried.status != Some(0)).then(|| {
                format!(
                    "lab/world does not run here (try lab/setup test):\n{}",
                    tried.text()
                )
            })
        })
        .clone()
}

/// Why QEMU guests can't run on this machine, if they can't.
pub fn guests_missing() -> Option<String> {
    let qemu = finish(
        {
            let mut version = Command::new("qemu-system-x86_64");
            version.arg("--version");
            version
        },
        Duration::from_secs(20),
    );
    if qemu.status != Some(0) {
        return Some("qemu-system-x86_64 is missing: run lab/setup test".to_owned());
    }
    if !lab().image {
        return Some("no guest image: run make image".to_owned());
    }
    world_missing()
}

/// Held by a test that fills the machine (two emulated guests do), so that one runs at a time.
pub fn heavy() -> MutexGuard<'static, ()> {
    static HEAVY: Mutex<()> = Mutex::new(());
    HEAVY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A directory that every user can write to, gone when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes one.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!(
            "lanlet-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir(&path).expect("a temporary directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("its mode");
        TempDir(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file in it that everybody may read; returns its path.
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, contents).expect("a temporary file");
        path
    }

    /// Reads a file in it; empty if there is none.
    pub fn read(&self, name: &str) -> String {
        fs::read(self.0.join(name))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }
}

impl Default for TempDir {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("kept for inspection: {}", self.0.display());
        } else {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// What a command or scenario left behind.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status; `None`: killed, by a signal or by the time limit.
    pub status: Option<i32>,
    /// Whether the time limit ended it.
    pub timed_out: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Wall-clock time.
    pub elapsed: Duration,
}

impl Outcome {
    /// Asserts that it exited with 0 in time.
    #[track_caller]
    pub fn passed(self) -> Self {
        assert_eq!(self.status, Some(0), "{}", self.text());
        self
    }

    /// Everything, for a failure's message.
    pub fn text(&self) -> String {
        let mut text = format!("status {:?} after {:?}", self.status, self.elapsed);
        if self.timed_out {
            text.push_str(", time limit");
        }
        let _ = write!(
            text,
            "\n--- stdout\n{}\n--- stderr\n{}",
            self.stdout, self.stderr
        );
        text
    }

    /// The markers that the scenario said.
    pub fn markers(&self) -> Markers {
        Markers::parse(&self.stdout)
    }
}

/// `@@LANLET key=value ...` lines of a scenario or a guest's console.
#[derive(Debug, Default)]
pub struct Markers(BTreeMap<String, Vec<String>>);

impl Markers {
    /// Finds them in a text.
    pub fn parse(text: &str) -> Self {
        let mut markers = Markers::default();
        // Firmware writes to the same line before the guest's first marker.
        let lines = text
            .lines()
            .filter_map(|line| line.split_once("@@LANLET ").map(|(_, words)| words));
        for word in lines.flat_map(str::split_whitespace) {
            if let Some((key, value)) = word.split_once('=') {
                let values = markers.0.entry(key.to_owned()).or_default();
                values.push(value.to_owned());
            }
        }
        markers
    }

    /// The last value said for a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.all(key).last().map(String::as_str)
    }

    /// All values said for a key, in order.
    pub fn all(&self, key: &str) -> &[String] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    /// The last value for a key as a number.
    #[track_caller]
    pub fn number(&self, key: &str) -> f64 {
        let value = self
            .get(key)
            .unwrap_or_else(|| panic!("no {key} in {self:?}"));
        value
            .parse()
            .unwrap_or_else(|_| panic!("{key}={value} is no number"))
    }

    /// Asserts that each of these steps ended with 0.
    #[track_caller]
    pub fn passed(&self, keys: &[&str]) {
        for key in keys {
            assert_eq!(self.get(key), Some("0"), "step {key}: {self:?}");
        }
    }
}

/// A world to run a scenario in.
pub struct World {
    options: Vec<String>,
    temp: TempDir,
    limit: Duration,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// One without servers.
    pub fn new() -> Self {
        World {
            options: Vec::new(),
            temp: TempDir::new(),
            limit: SCENARIO_TIME_MAX,
        }
    }

    /// With options of `lab/world`: `--dns`, `--iperf`, ...
    #[must_use]
    pub fn with(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(|&o| o.to_owned()));
        self
    }

    /// With another time limit.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The scenario's directory, `$TMP` in it.
    pub fn temp(&self) -> &TempDir {
        &self.temp
    }

    /// Runs a scenario as an unprivileged user to its end or to the time limit; nothing of it is
    /// left running.
    pub fn run(&self, scenario: &str) -> Outcome {
        let lab = lab();
        let text = format!("{}\n{scenario}\n", include_str!("prelude.sh"));
        let script = self.temp.file("scenario.sh", text);
        // What who runs the tests ignores (nohup) lanlet would leave ignored.
        let mut command = Command::new("env");
        command
            .arg("--default-signal=HUP,INT,QUIT")
            .arg(lab.dir.join("as-user"))
            .arg(lab.dir.join("world"))
            .args(&self.options)
            .args(["--", "bash"])
            .arg(script)
            .env("LANLET", &lab.lanlet)
            .env("LAB", &lab.dir)
            // A scenario that is killed can't tidy up.
            .env("LANLET_USER_DIR", self.temp.path())
            .env("TMP", self.temp.path());
        finish(command, self.limit)
    }

    /// The markers on a guest's console so far.
    pub fn console(&self, guest: &str) -> Markers {
        Markers::parse(&self.temp.read(&format!("{guest}.console")))
    }
}

/// Runs a command in a process group of its own to its end or to the time limit, then kills what is
/// left of the group.
pub fn finish(mut command: Command, limit: Duration) -> Outcome {
    let start = Instant::now();
    let spawned = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            return Outcome {
                status: None,
                timed_out: false,
                stdout: String::new(),
                stderr: format!("{}: {error}", command.get_program().to_string_lossy()),
                elapsed: start.elapsed(),
            };
        }
    };
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let (status, timed_out) = wait(&mut child, start + limit);
    // A survivor would keep the pipes open, and the readers waiting.
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
    Outcome {
        status,
        timed_out,
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
        elapsed: start.elapsed(),
    }
}

fn wait(child: &mut Child, deadline: Instant) -> (Option<i32>, bool) {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return (status.code(), false),
            Ok(None) if Instant::now() < deadline => thread::sleep(POLL),
            _ => return (None, true),
        }
    }
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
