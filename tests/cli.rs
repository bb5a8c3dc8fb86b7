//! The command line from outside: what it says and which status it leaves, without a network.
//! Nothing here needs a tap or a namespace; those tests run in the lab's worlds.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A directory of the test's own, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(label: &str) -> Self {
        let path = std::env::temp_dir().join(format!("lanlet-cli-{}-{label}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// lanlet with a runtime directory of its own and nothing else from the environment but PATH.
fn lanlet(runtime_dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lanlet"));
    command
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("LANLET_RUNTIME_DIR", runtime_dir)
        .env("XDG_STATE_HOME", runtime_dir)
        .stdin(Stdio::null());
    command
}

fn run(runtime_dir: &Path, arguments: &[&str]) -> (i32, String, String) {
    of(lanlet(runtime_dir, arguments).output().unwrap())
}

fn of(output: Output) -> (i32, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap_or(-1),
        text(output.stdout),
        text(output.stderr),
    )
}

#[track_caller]
fn refused(scratch: &Scratch, code: i32, arguments: &[&str], says: &[&str]) {
    let (status, stdout, stderr) = run(&scratch.0, arguments);
    assert_eq!(status, code, "{arguments:?}: {stderr}");
    assert!(
        stderr.starts_with("lanlet: error: "),
        "{arguments:?}: {stderr}"
    );
    for word in says {
        assert!(
            stderr.contains(word),
            "{arguments:?} does not say {word:?}: {stderr}"
        );
    }
    assert_eq!(stdout, "", "{arguments:?}");
}

#[test]
fn bad_input_is_refused_with_the_option_named() {
    let scratch = Scratch::new("input");
    for (arguments, says) in [
        (
            &["up", "--subnet", "1.2.3/24"][..],
            &["--subnet", "192.168.122.0/24"][..],
        ),
        (&["up", "--subnet", "10.0.0.0/30"], &["--subnet", "/29"]),
        (&["up", "--subnet6", "fd12::/48"], &["--subnet6", "/64"]),
        (&["up", "--subnet6", "fe80::/64"], &["--subnet6", "fd12"]),
        (
            &["up", "--subnet6", "fd12::/64", "--mtu", "1279"],
            &["subnet6", "1280"],
        ),
        (
            &["up", "--subnet", "10.0.0.1/24"],
            &["--subnet", "10.0.0.0/24"],
        ),
        (
            &["up", "--gateway", "10.0.0.1"],
            &["--gateway", "192.168.122.0/24"],
        ),
        (&["up", "--gateway", "x"], &["--gateway"]),
        (&["up", "--mtu", "100"], &["--mtu", "576"]),
        (&["up", "--mtu", "65522"], &["--mtu", "576 and 65521"]),
        (&["up", "--mtu", "65536"], &["--mtu"]),
        (
            &["up", "--dhcp-range", "192.168.122.9-192.168.122.1"],
            &["--dhcp-range"],
        ),
        (
            &["up", "--dhcp-range", "192.168.122.1-192.168.122.9"],
            &["--dhcp-range", "gateway"],
        ),
        (&["up", "--lease-time", "1s"], &["--lease-time", "10 s"]),
        (&["up", "--lease-time", "soon"], &["--lease-time", "15m"]),
        (&["up", "--dns", "localhost"], &["--dns"]),
        (&["up", "--dns", "0.0.0.0"], &["--dns"]),
        (&["up", "--domain", "a b"], &["--domain"]),
        (&["up", "--ageing", "0"], &["--ageing"]),
        (&["up", "--max-flows", "1"], &["--max-flows"]),
        (&["up", "--name", "../x"], &["--name"]),
        (&["up", "--name", ""], &["--name"]),
        (
            &["run", "--mac", "01:00:5e:00:00:01", "--", "true"],
            &["--mac", "group"],
        ),
        (
            &["run", "--subnet", "127.0.0.0/8", "--", "true"],
            &["--subnet", "loopback"],
        ),
        (&["exec", "--mtu", "1", "--", "true"], &["--mtu"]),
        (&["qemu", "--ageing", "0"], &["--ageing"]),
        (&["run"], &["CMD"]),
        (&["exec"], &["CMD"]),
        (&["nonsense"], &["nonsense"]),
        (&["status", "--nonsense"], &["--nonsense"]),
        (&["man", "nonsense"], &["nonsense"]),
        (&["completions", "nonsense"], &["nonsense"]),
    ] {
        refused(&scratch, 2, arguments, says);
    }
}

#[test]
fn a_network_that_does_not_run() {
    let scratch = Scratch::new("none");
    for command in ["status", "down"] {
        refused(
            &scratch,
            1,
            &[command, "--name", "lab"],
            &["'lab'", "lanlet up -d --name lab"],
        );
    }
    // A directory that does not exist is no error for one who only looks.
    let missing = scratch.0.join("missing");
    assert_eq!(run(&missing, &["status"]).0, 1);
    assert!(!missing.exists());
}

#[test]
fn runtime_directories_that_cannot_be_trusted_or_used() {
    let scratch = Scratch::new("dirs");
    let open = scratch.0.join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let link = scratch.0.join("link");
    symlink(&scratch.0, &link).unwrap();
    let file = scratch.0.join("file");
    fs::write(&file, "").unwrap();
    let below_file = file.join("below");
    let long = scratch.0.join("x".repeat(100));
    for (dir, says) in [
        (&open, "others may write"),
        (&link, "symbolic link"),
        (&file, "not a directory"),
        (&below_file, "Not a directory"),
        (&long, "bytes"),
    ] {
        let (status, _, stderr) = run(dir, &["up"]);
        assert_eq!(status, 1, "{stderr}");
        assert!(
            stderr.contains(says) && stderr.contains("LANLET_RUNTIME_DIR"),
            "{stderr}"
        );
    }
    // Nor may anybody be led to someone else's socket by them.
    let _listener = UnixListener::bind(open.join("default.sock")).unwrap();
    assert_eq!(run(&open, &["status"]).0, 1);
}

/// Without `up`, the claim is stood in for by flock(1): what counts is who holds the lock.
#[test]
fn a_busy_name_says_who_holds_it() {
    let scratch = Scratch::new("busy");
    let lock = scratch.0.join("default.lock");
    let mut holder = Command::new("flock")
        .arg(&lock)
        .args(["sh", "-c", "echo $$ >\"$0\"; echo locked; exec sleep 60"])
        .arg(&lock)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = holder.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut [0; 7]).unwrap();
    let pid = fs::read_to_string(&lock).unwrap();
    let busy = format!(
        "network 'default' is already running (pid {}): ",
        pid.trim()
    );
    let (status, _, stderr) = run(&scratch.0, &["up"]);
    // flock(1) and its child hold the lock together; both go before anything is asserted.
    let _ = Command::new("kill").arg(pid.trim()).status();
    let _ = holder.kill();
    let _ = holder.wait();
    assert_eq!(status, 1, "{stderr}");
    assert!(stderr.contains(&busy), "{stderr}");
}

#[test]
fn a_stale_socket_is_nobody() {
    let scratch = Scratch::new("stale");
    drop(UnixListener::bind(scratch.0.join("default.sock")).unwrap());
    refused(&scratch, 1, &["status"], &["is not running"]);
}

#[test]
fn help_of_every_command() {
    let scratch = Scratch::new("help");
    let (status, help, _) = run(&scratch.0, &["--help"]);
    assert_eq!(status, 0);
    for command in [
        "up",
        "run",
        "qemu",
        "exec",
        "status",
        "down",
        "demo",
        "check",
        "man",
        "completions",
    ] {
        assert!(
            help.contains(&format!("\n  {command} ")),
            "{command} is not in the help"
        );
        let (status, text, _) = run(&scratch.0, &[command, "--help"]);
        assert_eq!(status, 0, "{command}");
        assert!(
            text.contains("Usage: lanlet") && text.contains("Examples:"),
            "{command}: {text}"
        );
    }
    for hidden in ["child-init", "guest-init", "netns-helper"] {
        assert!(!help.contains(hidden), "{hidden}");
    }
    let (status, _, stderr) = run(&scratch.0, &[]);
    assert_eq!(status, 2);
    assert!(stderr.contains("Usage: lanlet"), "{stderr}");
}

#[test]
fn man_pages_and_completions() {
    let scratch = Scratch::new("man");
    let dir = scratch.0.to_str().unwrap();
    assert_eq!(run(&scratch.0, &["man", "--dir", dir]).0, 0);
    for page in ["lanlet", "lanlet-up", "lanlet-run", "lanlet-exec"] {
        let text = fs::read_to_string(scratch.0.join(format!("{page}.1"))).unwrap();
        assert!(text.contains(".SH EXAMPLES"), "{page}");
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (status, text, _) = run(&scratch.0, &["completions", shell]);
        assert_eq!(status, 0);
        assert!(text.contains("LANLET_COMPLETE"), "{shell}");
    }
    // A page as a reader sees it: what is indented in the help stays in lines of its own.
    for (page, lines) in [
        (
            "forward-add",
            &[
                "{tcp|udp}:[ADDR]:PORT-GUEST:PORT                 QEMU's hostfwd",
                "lanlet forward add 8080:192.168.122.70:80",
            ][..],
        ),
        ("policy", &["default allow|deny [silent]"]),
        ("run", &["lanlet run --subnet 10.9.0.0/24"]),
    ] {
        let (_, roff, _) = run(&scratch.0, &["man", page]);
        let path = scratch.0.join(format!("{page}.1"));
        fs::write(&path, roff).unwrap();
        let shown = Command::new("groff")
            .args(["-man", "-Kutf8", "-Tutf8", "-P-cbou", "-rLL=120n", "-ww"])
            .arg(&path)
            .output()
            .expect("groff: run lab/setup test");
        let (status, text, warnings) = of(shown);
        assert_eq!((status, &*warnings), (0, ""), "{page}");
        for line in lines {
            let is_line = |shown: &str| shown.trim_start().starts_with(line);
            assert!(
                text.lines().any(is_line),
                "{page} has no line {line:?}: {text}"
            );
        }
    }
}

/// What a shell offers, by the script that it sources.
#[test]
fn bash_completes_commands_files_and_what_runs() {
    let scratch = Scratch::new("complete");
    let complete = |line: &[&str]| {
        let script = r#"
            eval "$("$LANLET" completions bash)"
            PATH=$PATH:$(dirname "$LANLET")
            COMP_WORDS=(lanlet "$@") COMP_CWORD=$# COMP_TYPE=9
            word=${COMP_WORDS[COMP_CWORD]}
            compopt() { :; }
            $(complete -p lanlet | sed 's/.*-F \([^ ]*\).*/\1/') lanlet "$word" ""
            printf '%s\n' "${COMPREPLY[@]}"
        "#;
        let output = Command::new("bash")
            .args(["--norc", "-c", script, "bash"])
            .args(line)
            .env("LANLET", env!("CARGO_BIN_EXE_lanlet"))
            .env("LANLET_RUNTIME_DIR", &scratch.0)
            .current_dir(&scratch.0)
            .output()
            .unwrap();
        let (status, text, stderr) = of(output);
        assert_eq!((status, &*stderr), (0, ""), "{line:?}: {text}");
        let words = text.lines().map(|line| line.trim_end().to_owned());
        words.collect::<Vec<_>>()
    };
    let commands = complete(&[""]);
    for command in ["up", "exec", "list", "completions", "help"] {
        assert!(commands.iter().any(|word| word == command), "{commands:?}");
    }
    for hidden in ["child-init", "guest-init", "netns-helper", "bench-peer"] {
        assert_eq!(complete(&[hidden]), [""], "nobody knows of {hidden}");
    }
    assert_eq!(complete(&["up", "--lease-f"]), ["--lease-file"]);
    fs::write(scratch.0.join("web.policy"), "").unwrap();
    assert_eq!(complete(&["policy", "set", "we"]), ["web.policy"]);
    assert_eq!(complete(&["up", "--policy", "we"]), ["web.policy"]);
    assert_eq!(complete(&["exec", "--", "bas"])[0], "base32");
    // A name is one that runs: its lock is held.
    let lock = fs::File::create(scratch.0.join("lab.lock")).unwrap();
    fs::write(scratch.0.join("old.lock"), "1").unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(complete(&["status", "--name", ""]), ["lab"]);
    assert_eq!(complete(&["exec", "--name", "l"]), ["lab"]);
}

#[test]
fn help_is_a_command() {
    let scratch = Scratch::new("helps");
    let (status, text, _) = run(&scratch.0, &["help"]);
    assert_eq!((status, text.contains("Usage: lanlet")), (0, true));
    for words in [&["up"][..], &["forward", "add"]] {
        let (status, text, _) = run(&scratch.0, &[&["help"], words].concat());
        assert_eq!(status, 0);
        let flag = run(&scratch.0, &[words, &["--help"]].concat());
        assert_eq!(text, flag.1, "{words:?}");
    }
    refused(&scratch, 2, &["help", "nonsense"], &["nonsense"]);
}

#[test]
fn a_closed_pipe_is_no_error() {
    let scratch = Scratch::new("pipe");
    for arguments in [
        &["man", "up"][..],
        &["completions", "bash"],
        &["--help"],
        &["run", "--help"],
    ] {
        let mut child = lanlet(&scratch.0, arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{arguments:?}");
    }
}

#[test]
fn a_wrong_log_level_is_said_and_nothing_more() {
    let scratch = Scratch::new("log");
    let output = lanlet(&scratch.0, &["man"])
        .env("LANLET_LOG", "loud")
        .output()
        .unwrap();
    let (status, _, stderr) = of(output);
    assert_eq!(status, 0);
    assert!(
        stderr.contains("warning") && stderr.contains("\"loud\""),
        "{stderr}"
    );
}

#[test]
fn the_demo_says_where_it_looked_for_its_lab() {
    let scratch = Scratch::new("lab");
    let dir = scratch.0.to_str().unwrap();
    refused(&scratch, 1, &["demo", "--lab", dir], &[dir, "--lab"]);
    fs::write(scratch.0.join("world"), "").unwrap();
    refused(
        &scratch,
        1,
        &["demo", "--lab", dir],
        &["vmlinuz", "make image"],
    );
}

#[test]
fn no_qemu_names_the_package() {
    let scratch = Scratch::new("qemu");
    let output = lanlet(&scratch.0, &["qemu"])
        .env("PATH", &scratch.0)
        .output()
        .unwrap();
    let (status, _, stderr) = of(output);
    assert_eq!(status, 1);
    assert!(
        stderr.contains("qemu-system-") && stderr.contains("--qemu"),
        "{stderr}"
    );
}
