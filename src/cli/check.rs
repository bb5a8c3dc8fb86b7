//! `lanlet check`: what this machine can do, tried out rather than guessed.

use std::fmt::Write;
use std::fs;
use std::net::IpAddr;
use std::process::ExitCode;

use rustix::net::{AddressFamily, SocketType, ipproto};
use rustix::process::{Resource, getrlimit};

use super::exec::NewGuest;
use super::{Failure, print, qemu};
use crate::config::NetworkConfig;
use crate::control::RuntimeDir;
use crate::network::open_files_wanted;
use crate::tap::{Helper, WireKind, WireOptions};

/// Show what this machine can do, and what to change where it can't
///
/// Every line is tried, not guessed. Exits with 0 if 'run', 'qemu' and 'exec' will work, with 1 if
/// not. What is only a 'note' works, with less comfort.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet check")]
pub(super) struct Args {}

/// How one thing is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Good,
    /// Works with less comfort.
    Note,
    /// `run`, `qemu` or `exec` won't work.
    Bad,
}

struct Report {
    lines: Vec<(Verdict, &'static str, String)>,
}

impl Report {
    fn add(&mut self, verdict: Verdict, what: &'static str, finding: impl Into<String>) {
        self.lines.push((verdict, what, finding.into()));
    }

    fn is_good(&self) -> bool {
        self.lines
            .iter()
            .all(|(verdict, ..)| *verdict != Verdict::Bad)
    }

    fn render(&self) -> String {
        let mut text = String::new();
        for (verdict, what, finding) in &self.lines {
            let word = match verdict {
                Verdict::Good => "ok",
                Verdict::Note => "note",
                Verdict::Bad => "FAIL",
            };
            let _ = writeln!(text, "{word:<5} {what:<17} {finding}");
        }
        text.push_str(match self.is_good() {
            true => "\nAll set: 'lanlet qemu', 'run' and 'exec' will work.\n",
            false => "\nSomething is missing: see the lines with FAIL.\n",
        });
        text
    }
}

pub(super) fn check(_: &Args) -> Result<ExitCode, Failure> {
    let mut report = Report { lines: Vec::new() };
    vmm_taps(&mut report);
    namespace_guests(&mut report);
    runtime_directory(&mut report);
    ping_sockets(&mut report);
    resolvers(&mut report);
    open_files(&mut report);
    match qemu::find() {
        Ok(path) => report.add(Verdict::Good, "QEMU", path.display().to_string()),
        Err(Failure::Runtime(error)) => report.add(Verdict::Note, "QEMU", error.to_string()),
        Err(_) => {}
    }
    print(&report.render())?;
    Ok(if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Makes a VMM's tap, the whole way.
fn vmm_taps(report: &mut Report) {
    let made = Helper::spawn(None)
        .and_then(|(helper, _events)| helper.create_wire(WireOptions::default()));
    match made.map(|wire| wire.kind) {
        Ok(WireKind::Mirred) => report.add(Verdict::Good, "taps for VMMs", "joined by tc mirred"),
        Ok(WireKind::Packet) => report.add(
            Verdict::Note,
            "taps for VMMs",
            "by packet socket, which is slower: the kernel lacks act_mirred (as root, \
             'modprobe act_mirred cls_matchall')",
        ),
        Err(error) => report.add(Verdict::Bad, "taps for VMMs", error.to_string()),
    }
}

fn namespace_guests(report: &mut Report) {
    match NewGuest::spawn(&["true".into()], (1, false)) {
        Ok(_) => report.add(
            Verdict::Good,
            "namespace guests",
            "user and network namespaces work",
        ),
        Err(Failure::Runtime(error)) => {
            report.add(Verdict::Bad, "namespace guests", error.to_string());
        }
        Err(_) => report.add(Verdict::Bad, "namespace guests", "failed"),
    }
}

fn runtime_directory(report: &mut Report) {
    let dir = RuntimeDir::from_env();
    // A name of this process's own, so that no running network is disturbed.
    match dir.claim(&format!("check-{}", std::process::id())) {
        Ok(claim) => {
            claim.forget();
            report.add(
                Verdict::Good,
                "runtime directory",
                dir.path().display().to_string(),
            );
        }
        Err(error) => {
            report.add(
                Verdict::Note,
                "runtime directory",
                format!("'lanlet up' won't work: {error}"),
            );
        }
    }
}

fn ping_sockets(report: &mut Report) {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP));
    match socket {
        Ok(_) => report.add(Verdict::Good, "ping to outside", "ping sockets are allowed"),
        Err(error) => report.add(
            Verdict::Note,
            "ping to outside",
            format!(
                "guests can't ping beyond the gateway ({error}): as root, \
                 'sysctl -w net.ipv4.ping_group_range=\"0 2147483647\"'"
            ),
        ),
    }
}

fn resolvers(report: &mut Report) {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = nameservers(&text);
    match servers.is_empty() {
        true => report.add(
            Verdict::Note,
            "resolvers",
            "none in /etc/resolv.conf: guests resolve names only with --dns ADDR",
        ),
        false => report.add(Verdict::Good, "resolvers", servers.join(", ")),
    }
}

fn nameservers(text: &str) -> Vec<String> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        let address = words.next().filter(|_| is_server)?;
        // A scope (fe80::1%eth0) is no part of the address.
        let bare = address.split('%').next().unwrap_or(address);
        bare.parse::<IpAddr>().ok().map(|_| address.to_owned())
    };
    text.lines().filter_map(address).collect()
}

fn open_files(report: &mut Report) {
    let flows_max = NetworkConfig::default().flows_max;
    let wanted = open_files_wanted(flows_max, &[]);
    match getrlimit(Resource::Nofile).maximum {
        Some(maximum) if maximum < wanted as u64 => report.add(
            Verdict::Note,
            "open files",
            format!(
                "{maximum} at most, and each connection of a guest takes one: a full network of \
                 {flows_max} needs {wanted}; raise the hard limit ('ulimit -Hn', LimitNOFILE=)"
            ),
        ),
        Some(maximum) => report.add(Verdict::Good, "open files", format!("{maximum} at most")),
        None => report.add(Verdict::Good, "open files", "unlimited"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_of_a_resolver_file() {
        let text = "# x\nnameserver 9.9.9.9\n nameserver fe80::1%eth0 \nsearch a\nnameserver x\nnameservers 1.1.1.1";
        assert_eq!(nameservers(text), ["9.9.9.9", "fe80::1%eth0"]);
    }

    #[test]
    fn a_note_is_no_failure() {
        let mut report = Report { lines: Vec::new() };
        report.add(Verdict::Note, "a", "b");
        assert!(report.is_good());
        report.add(Verdict::Bad, "c", "d");
        assert!(!report.is_good());
        assert!(report.render().contains("FAIL  c                 d\n"));
    }
}
