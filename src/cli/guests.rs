//! The guests of a network: the table of `lanlet status`, and `lanlet ip`.

use std::net::IpAddr;
use std::process::ExitCode;

use super::find::connect;
use super::options::NameOption;
use super::screen::{age, cut, short};
use super::status::{printable, table};
use super::{Failure, complete, print};
use crate::frame::Mac;
use crate::network::{GuestStatus, Status};

/// Longest name shown where lines have to fit 80 columns: what the other columns leave at their widest.
const NAME_CHARS_MAX: usize = 23;

/// Print a guest's address
///
/// GUEST is the guest's name, the name that it gave itself by DHCP, its MAC or the number of its port. A
/// guest whose address is not known yet is an error, with status 1: 'lanlet wait --guests' waits for it.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet ip web
  ssh root@$(lanlet ip web)
  lanlet ip -6 52:54:00:12:34:56
  lanlet ip --name lab web")]
pub(super) struct IpArgs {
    #[command(flatten)]
    name: NameOption,
    /// The IPv6 address
    #[arg(short = '6', long)]
    ipv6: bool,
    /// Which guest
    #[arg(value_name = "GUEST", add = complete::guests())]
    guest: String,
}

pub(super) fn ip(args: &IpArgs) -> Result<ExitCode, Failure> {
    let mut client = connect(&args.name)?;
    let status = client.status()?;
    let address = address_of(&status, &args.guest, args.ipv6)
        .map_err(|reason| Failure::because(format!("network '{}': {reason}", status.name)))?;
    print(&format!("{address}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// The address of the guest that is meant.
fn address_of(status: &Status, guest: &str, ipv6: bool) -> Result<IpAddr, String> {
    let found = find(status, guest);
    let address = |guest: &&GuestStatus| match ipv6 {
        false => guest.ipv4.first().map(|&address| address.into()),
        true => guest.ipv6.first().map(|&address| address.into()),
    };
    let family = if ipv6 { "IPv6" } else { "IPv4" };
    match found.iter().find_map(address) {
        Some(address) => Ok(address),
        None if found.is_empty() => {
            let mut names: Vec<_> = status.guests.iter().map(|guest| &*guest.name).collect();
            names.dedup();
            Err(match names[..] {
                [] => format!("there is no guest {guest:?}, nor any other"),
                _ => format!(
                    "there is no guest {guest:?} (there are: {})",
                    names.join(", ")
                ),
            })
        }
        None => Err(format!(
            "no {family} address is known of the guest {guest:?}: it has no lease and was not heard \
             with one"
        )),
    }
}

/// The guests that are meant: by the name of their port, else by what they call themselves, their MAC or
/// the number of their port.
fn find<'a>(status: &'a Status, words: &str) -> Vec<&'a GuestStatus> {
    let mac = words.parse::<Mac>().ok().map(|mac| mac.to_string());
    let port = words.parse::<u16>().ok();
    let is_hostname = |guest: &GuestStatus| {
        let name = guest.hostname.as_deref();
        name.is_some_and(|name| name.eq_ignore_ascii_case(words))
    };
    let ways: [&dyn Fn(&GuestStatus) -> bool; 4] = [
        &|guest| guest.name.eq_ignore_ascii_case(words),
        &is_hostname,
        &|guest| mac.is_some() && guest.mac == mac,
        &|guest| port == Some(guest.port),
    ];
    ways.into_iter()
        .map(|is_meant| {
            status
                .guests
                .iter()
                .filter(|guest| is_meant(guest))
                .collect()
        })
        .find(|found: &Vec<_>| !found.is_empty())
        .unwrap_or_default()
}

/// Appends the table of guests: in one line each where the terminal is wide enough, else in two.
pub(super) fn render(text: &mut String, guests: &[GuestStatus], columns: usize) {
    let mut wide = String::new();
    let heads = [
        "NAME", "ADDRESS", "IPv6", "MAC", "KIND", "RX", "TX", "DROPS", "SINCE",
    ];
    let rows = rows(guests);
    table(
        &mut wide,
        &heads,
        "<<<<<>>>>",
        rows.iter().map(Row::wide).collect(),
    );
    if wide.lines().all(|line| line.chars().count() <= columns) {
        return text.push_str(&wide);
    }
    let mut narrow = String::new();
    let heads = ["NAME", "ADDRESS", "KIND", "RX", "TX", "DROPS", "SINCE"];
    table(
        &mut narrow,
        &heads,
        "<<<>>>>",
        rows.iter().map(Row::narrow).collect(),
    );
    let below = |(mac, ipv6): (&str, &str)| format!("  {mac:<17}  {ipv6}").trim_end().to_owned();
    let second = [below(("MAC", "IPv6"))]
        .into_iter()
        .chain(rows.iter().map(|row| below((&row.mac, &row.ipv6))));
    let lines = narrow.trim_start().lines().zip(second);
    text.push('\n');
    for (first, second) in lines {
        text.push_str(first);
        text.push('\n');
        text.push_str(&second);
        text.push('\n');
    }
}

/// What is shown of a guest.
struct Row {
    name: String,
    address: String,
    ipv6: String,
    mac: String,
    /// Of the port, with the first of its guests: kind, bytes, drops, age.
    of_port: [String; 5],
}

fn rows(guests: &[GuestStatus]) -> Vec<Row> {
    let mut before = None;
    let row = |guest: &GuestStatus| {
        let known = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let is_first = before.replace(guest.port) != Some(guest.port);
        Row {
            name: printable(&guest.name),
            address: known(guest.ipv4.first().map(ToString::to_string)),
            ipv6: known(guest.ipv6.first().map(ToString::to_string)),
            mac: known(guest.mac.clone()),
            of_port: match is_first {
                true => [
                    guest.kind.clone(),
                    short(guest.received_bytes, 1024),
                    short(guest.sent_bytes, 1024),
                    short(guest.drops, 1000),
                    age(guest.attached_secs),
                ],
                false => Default::default(),
            },
        }
    };
    guests.iter().map(row).collect()
}

impl Row {
    fn wide(&self) -> Vec<String> {
        let own = [&self.name, &self.address, &self.ipv6, &self.mac];
        own.into_iter().chain(&self.of_port).cloned().collect()
    }

    fn narrow(&self) -> Vec<String> {
        let name = cut(&self.name, NAME_CHARS_MAX);
        let own = [name.trim_end().to_owned(), self.address.clone()];
        own.into_iter()
            .chain(self.of_port.iter().cloned())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(name: &str, port: u16) -> GuestStatus {
        GuestStatus {
            name: name.to_owned(),
            port,
            kind: "vmm".to_owned(),
            mac: Some(format!("52:54:00:00:00:{port:02x}")),
            hostname: Some(format!("host{port}")),
            ipv4: vec![[192, 168, 122, 100 + port as u8].into()],
            ipv6: vec!["fd12:3456:789a:1:5054:ff:fe00:1".parse().unwrap()],
            received_bytes: 3 << 20,
            sent_bytes: 999,
            drops: 12_345,
            attached_secs: 7300,
        }
    }

    #[test]
    fn the_table_fits_the_terminal() {
        let mut bridge = guest("bridge", 2);
        (bridge.ipv4, bridge.ipv6) = (Vec::new(), Vec::new());
        let second = GuestStatus {
            mac: None,
            ..bridge.clone()
        };
        let guests = [guest("web", 1), bridge, second];
        let mut text = String::new();
        render(&mut text, &guests, 120);
        assert_eq!(
            text,
            "
NAME    ADDRESS          IPv6                             MAC                KIND    RX   TX  DROPS  SINCE
web     192.168.122.101  fd12:3456:789a:1:5054:ff:fe00:1  52:54:00:00:00:01  vmm   3.0M  999    12K     2h
bridge  -                -                                52:54:00:00:00:02  vmm   3.0M  999    12K     2h
bridge  -                -                                -
"
        );
        text.clear();
        render(&mut text, &guests, 80);
        assert_eq!(
            text,
            "
NAME    ADDRESS          KIND    RX   TX  DROPS  SINCE
  MAC                IPv6
web     192.168.122.101  vmm   3.0M  999    12K     2h
  52:54:00:00:00:01  fd12:3456:789a:1:5054:ff:fe00:1
bridge  -                vmm   3.0M  999    12K     2h
  52:54:00:00:00:02  -
bridge  -
  -                  -
"
        );
        // The widest that there can be.
        let mut widest = guest(&"n".repeat(63), 1);
        widest.kind = "vhost-user".to_owned();
        widest.ipv6 = vec!["fd12:3456:789a:bcde:1234:5678:9abc:def0".parse().unwrap()];
        (widest.received_bytes, widest.sent_bytes) = (1023 << 40, 1023);
        (widest.drops, widest.attached_secs) = (999_000, 9999 * 86_400);
        text.clear();
        render(&mut text, &[widest], 80);
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line:?}");
        }
        text.clear();
        render(&mut text, &[], 80);
        assert_eq!(text, "");
    }

    #[test]
    fn a_guest_is_found_by_any_of_its_names() {
        let mut web = guest("web", 1);
        web.hostname = Some("db".to_owned());
        let mut db = guest("db", 2);
        db.ipv6.clear();
        let status = Status {
            guests: vec![web, db],
            ..Status::default()
        };
        let v4 = |words: &str| address_of(&status, words, false).map(|address| address.to_string());
        assert_eq!(v4("WEB").unwrap(), "192.168.122.101");
        assert_eq!(v4("db").unwrap(), "192.168.122.102", "its name comes first");
        assert_eq!(v4("host2").unwrap(), "192.168.122.102");
        assert_eq!(v4("52:54:00:00:00:01").unwrap(), "192.168.122.101");
        assert_eq!(v4("2").unwrap(), "192.168.122.102");
        assert!(v4("nobody").unwrap_err().contains("web, db"));
        let reason = address_of(&status, "db", true).unwrap_err();
        assert!(reason.contains("no IPv6 address is known"), "{reason}");
        assert!(address_of(&status, "web", true).unwrap().is_ipv6());
    }
}
