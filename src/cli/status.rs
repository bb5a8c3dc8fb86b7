//! `lanlet status`: a running network's ports, addresses and drops.

use std::fmt::Write;
use std::process::ExitCode;
use std::time::Duration;

use super::find::connect;
use super::options::NameOption;
use super::{Failure, guests, print, screen};
use crate::network::{PortStatus, Status};

/// Columns where standard output is no terminal.
const COLUMNS: usize = 80;

/// Show a running network's guests, ports, counters, leases, forwards and flows
///
/// RX and TX of a guest are what it received and sent, with its port's other guests. Of a port, 'from guest'
/// is what its guests sent. A drop stands with the port it belongs to, by reason; 'kernel_' ones happened in
/// the tap's own queue. The guests' table fits 80 columns, and is in one line each where there are more.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet status
  lanlet status --name lab --json | jq '.ports[] | {name, drops}'")]
pub(super) struct Args {
    #[command(flatten)]
    name: NameOption,
    /// The same as one JSON object, with stable names
    #[arg(long)]
    json: bool,
}

pub(super) fn status(args: &Args) -> Result<ExitCode, Failure> {
    let status = connect(&args.name)?.status()?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&status).map_err(std::io::Error::from)? + "\n",
        false => render(&status, screen::columns().unwrap_or(COLUMNS)),
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// The status as tables, that of the guests for so many columns.
fn render(status: &Status, columns: usize) -> String {
    let ipv6 = status.ipv6.as_ref().map_or(String::new(), |ipv6| {
        let route = match ipv6.default_route {
            true => "",
            false => ", no default route (the host has no IPv6)",
        };
        let gateway = ipv6
            .gateway
            .map_or(String::new(), |gateway| format!("{gateway}, "));
        format!(
            "IPv6 {}, gateway {gateway}{}{route}\n",
            ipv6.subnet, ipv6.link_local
        )
    });
    let workers = match status.workers {
        0 | 1 => String::new(),
        workers => format!(", {workers} workers"),
    };
    let gateway = status
        .gateway
        .map_or(String::new(), |gateway| format!(", gateway {gateway}"));
    let mut text = format!(
        "network {} (pid {}), up {}{workers}\nsubnet {}{gateway}, MTU {}\n{ipv6}",
        status.name,
        status.pid,
        uptime(Duration::from_secs(status.uptime_secs)),
        status.subnet,
        status.mtu,
    );
    let flows = &status.flows;
    let _ = match &status.incomplete {
        None => writeln!(
            text,
            "flows: {} TCP, {} UDP, {} ICMP; {} of {} for TCP's buffers",
            flows.tcp,
            flows.udp,
            flows.icmp,
            bytes(flows.tcp_memory as u64),
            bytes(flows.tcp_memory_max as u64)
        ),
        Some(why) => writeln!(text, "flows: unknown, {why}"),
    };
    guests::render(&mut text, &status.guests, columns);
    let heads = [
        "PORT",
        "NAME",
        "KIND",
        "FROM GUEST",
        "",
        "TO GUEST",
        "",
        "DROPPED",
    ];
    table(
        &mut text,
        &heads,
        "<<<>>>><",
        status.ports.iter().map(port_row).collect(),
    );
    let leases = status.leases.iter().map(|lease| {
        vec![
            lease.address.to_string(),
            lease.mac.clone(),
            printable(lease.hostname.as_deref().unwrap_or("-")),
            lease
                .expires_secs
                .map_or("with its port".to_owned(), |secs| {
                    format!("in {}", uptime(Duration::from_secs(secs)))
                }),
        ]
    });
    table(
        &mut text,
        &["LEASE", "MAC", "HOST NAME", "ENDS"],
        "<<<<",
        leases.collect(),
    );
    super::forward::render(&mut text, &status.forwards);
    if let Some(policy) = &status.policy {
        super::policy::render(&mut text, policy);
    }
    let gauges = status.gauges.iter();
    let gauges = gauges.map(|(name, count)| vec![name.clone(), count.to_string()]);
    table(&mut text, &["NOW", ""], "<>", gauges.collect());
    let totals = status.totals.iter();
    let totals =
        totals.filter(|&(name, &count)| count != 0 && !status.gauges.contains_key(name.as_str()));
    let totals = totals.map(|(name, count)| vec![name.clone(), count.to_string()]);
    table(&mut text, &["TOTALS", ""], "<>", totals.collect());
    text
}

fn port_row(port: &PortStatus) -> Vec<String> {
    let mut drops = String::new();
    for (reason, count) in port.drops.iter().filter(|&(_, &count)| count != 0) {
        let _ = write!(
            drops,
            "{}{reason} {count}",
            if drops.is_empty() { "" } else { ", " }
        );
    }
    vec![
        port.id.to_string(),
        printable(&port.name),
        port.kind.clone(),
        port.rx_frames.to_string(),
        bytes(port.rx_bytes),
        port.tx_frames.to_string(),
        bytes(port.tx_bytes),
        if drops.is_empty() {
            "-".to_owned()
        } else {
            drops
        },
    ]
}

/// A guest chooses its host name; its control characters stay off the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// Appends a table, columns aligned left (`<`) or right (`>`); nothing where there are no rows.
pub(super) fn table(text: &mut String, heads: &[&str], align: &str, rows: Vec<Vec<String>>) {
    if rows.is_empty() {
        return;
    }
    let mut lines = vec![heads.iter().map(ToString::to_string).collect::<Vec<_>>()];
    lines.extend(rows);
    let widths: Vec<usize> = (0..heads.len())
        .map(|column| {
            lines
                .iter()
                .map(|line| line[column].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    text.push('\n');
    for line in lines {
        let mut row = String::new();
        for ((cell, &width), align) in line.iter().zip(&widths).zip(align.chars()) {
            let _ = match align {
                '>' => write!(row, "{cell:>width$}  "),
                _ => write!(row, "{cell:<width$}  "),
            };
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
}

/// Bytes in a unit that leaves at most four digits.
fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return match unit {
                "B" => format!("{count} B"),
                _ => format!("{value:.1} {unit}"),
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// A time of day style span: `3d 04:05:06`, `04:05:06`.
pub(super) fn uptime(time: Duration) -> String {
    let secs = time.as_secs();
    let clock = format!(
        "{:02}:{:02}:{:02}",
        secs / 3600 % 24,
        secs / 60 % 60,
        secs % 60
    );
    match secs / 86_400 {
        0 => clock,
        days => format!("{days}d {clock}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{
        FlowStatus, ForwardStatus, GuestStatus, Ipv6Status, LeaseStatus, MacStatus,
    };

    #[test]
    fn the_whole_picture() {
        let port = |id, name: &str, drops: &[(&str, u64)]| PortStatus {
            id,
            name: name.to_owned(),
            group: None,
            kind: "vmm".to_owned(),
            mac: None,
            attached_secs: 60,
            queues: 1,
            worker: 0,
            rx_frames: 12,
            rx_joined: 0,
            rx_bytes: 2048,
            tx_frames: 3,
            tx_bytes: 999,
            drops: drops
                .iter()
                .map(|&(reason, count)| (reason.to_owned(), count))
                .collect(),
        };
        let status = Status {
            name: "lab".to_owned(),
            pid: 7,
            command: "lanlet up".to_owned(),
            uptime_secs: 93_784,
            version: "1".to_owned(),
            subnet: "10.0.0.0/24".to_owned(),
            gateway: Some([10, 0, 0, 1].into()),
            prefix_len: 24,
            ipv6: Some(Ipv6Status {
                subnet: "fd12::/64".to_owned(),
                gateway: Some("fd12::1".parse().unwrap()),
                prefix_len: 64,
                link_local: "fe80::1".parse().unwrap(),
                default_route: false,
            }),
            mtu: 1500,
            workers: 2,
            guests: vec![GuestStatus {
                name: "vm1".to_owned(),
                mac: Some("52:54:00:00:00:01".to_owned()),
                ipv4: vec![[10, 0, 0, 2].into()],
                kind: "vmm".to_owned(),
                ..GuestStatus::default()
            }],
            ports: vec![
                port(0, "gateway", &[]),
                port(1, "vm1", &[("no_flow", 2), ("zero", 0), ("truncated", 1)]),
            ],
            macs: vec![MacStatus {
                mac: "52:54:00:00:00:01".to_owned(),
                port: 1,
            }],
            leases: vec![LeaseStatus {
                address: [10, 0, 0, 2].into(),
                mac: "52:54:00:00:00:01".to_owned(),
                port: Some(1),
                hostname: Some("al\u{1b}[2Jice".to_owned()),
                expires_secs: Some(3599),
            }],
            flows: FlowStatus {
                tcp: 4,
                udp: 1,
                icmp: 0,
                tcp_memory: 3 << 20,
                tcp_memory_max: 1 << 30,
            },
            forwards: vec![ForwardStatus {
                id: 1,
                forward: "8080:10.0.0.2:80".to_owned(),
                opened: 3,
                ..ForwardStatus::default()
            }],
            policy: None,
            totals: [
                ("flows_opened".to_owned(), 9),
                ("nothing".to_owned(), 0),
                ("host_sockets".to_owned(), 4),
            ]
            .into(),
            gauges: [("host_sockets".to_owned(), 4)].into(),
            incomplete: None,
        };
        assert_eq!(
            render(&status, 80),
            "\
network lab (pid 7), up 1d 02:03:04, 2 workers
subnet 10.0.0.0/24, gateway 10.0.0.1, MTU 1500
IPv6 fd12::/64, gateway fd12::1, fe80::1, no default route (the host has no IPv6)
flows: 4 TCP, 1 UDP, 0 ICMP; 3.0 MiB of 1.0 GiB for TCP's buffers

NAME  ADDRESS   IPv6  MAC                KIND  RX  TX  DROPS  SINCE
vm1   10.0.0.2  -     52:54:00:00:00:01  vmm    0   0      0     0s

PORT  NAME     KIND  FROM GUEST           TO GUEST         DROPPED
0     gateway  vmm           12  2.0 KiB         3  999 B  -
1     vm1      vmm           12  2.0 KiB         3  999 B  no_flow 2, truncated 1

LEASE     MAC                HOST NAME  ENDS
10.0.0.2  52:54:00:00:00:01  al?[2Jice  in 00:59:59

FORWARD                    OPENED  WAITING  REFUSED
      1  8080:10.0.0.2:80       3        0        0

NOW
host_sockets  4

TOTALS
flows_opened  9
"
        );
    }

    #[test]
    fn what_is_unknown_is_not_shown_as_zero() {
        let status = Status {
            incomplete: Some("the data path has ended".to_owned()),
            ..Status::default()
        };
        let text = render(&status, 80);
        assert!(
            text.contains("flows: unknown, the data path has ended\n"),
            "{text}"
        );
        assert!(!text.contains("TCP"));
    }

    #[test]
    fn sizes() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1024), bytes(5 << 40)],
            ["0 B", "1023 B", "1.0 KiB", "5.0 TiB"]
        );
    }
}
