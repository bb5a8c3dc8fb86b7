//! `lanlet policy`: the egress policy of a running network, and the files that policies come from.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use super::find::connect;
use super::options::NameOption;
use super::status::{printable, table, uptime};
use super::{Failure, print};
use crate::control::RuntimeDir;
use crate::control::client::Client;
use crate::nat::policy::Policy;
use crate::nat::policy::ledger::{DeniedView, PolicyView};
use crate::nat::policy::parse::TEXT_LEN_MAX;
use crate::nat::policy::rule::GuestTerm;
use crate::network::PortStatus;

/// Set, show and check the egress policy: which guest may reach what outside
///
/// A policy is a text of one rule per line. The first rule that matches decides, and `default`, which
/// has to be said, where none does:
///   allow|deny [silent] [guest GUESTS] [to DESTINATIONS] [PROTOCOLS [PORTS]]
///   default allow|deny [silent]
/// GUESTS are port=NAME and group=NAME (--guest-name and --group of run, qemu and exec), DESTINATIONS
/// addresses, networks, the words any, internet, private and metadata, names (example.org), all names
/// below one (*.example.org) and all names (*), PROTOCOLS tcp, udp and icmp, PORTS like 443 or
/// 8000-8999. Lists have commas and no blanks. What follows a # is comment.
///
/// A guest that a rule with a name is about reaches what it has asked the gateway's DNS server for; a
/// literal address needs a rule with addresses, another DNS server one with its address and port.
/// 'lanlet status' shows what each rule did and what was denied last.
#[derive(clap::Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  lanlet policy check web.policy
  lanlet policy set web.policy
  lanlet policy show --name lab
  printf 'allow to *.example.org tcp 443\\ndefault deny\\n' | lanlet policy set -
  lanlet policy clear"
)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand, Debug)]
enum Action {
    Set(SetArgs),
    Show(ShowArgs),
    Clear(ClearArgs),
    Check(CheckArgs),
}

/// Put a policy in force on a running network
///
/// A text with an error is refused whole. What the policy denies ends at once: connections with RST.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet policy set web.policy
  lanlet policy set --name lab - < web.policy")]
struct SetArgs {
    #[command(flatten)]
    name: NameOption,
    /// The policy's text; - is standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Print the policy in force, which says 'default allow' where there is none
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet policy show
  lanlet policy show --name lab > lab.policy")]
struct ShowArgs {
    #[command(flatten)]
    name: NameOption,
}

/// Take the policy out of force: guests may go wherever the network lets them
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet policy clear
  lanlet policy clear --name lab")]
struct ClearArgs {
    #[command(flatten)]
    name: NameOption,
}

/// Check a policy's text; it needs no network
///
/// Where the network runs, each guest and group in the text that it does not have now is warned of.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet policy check web.policy")]
struct CheckArgs {
    #[command(flatten)]
    name: NameOption,
    /// The policy's text; - is standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Printed where there is no policy: what that amounts to.
const NO_POLICY: &str = "# no policy is set\ndefault allow\n";

pub(super) fn policy(args: &Args) -> Result<ExitCode, Failure> {
    match &args.action {
        Action::Set(args) => {
            let (policy, text) = read(&args.file)?;
            let mut client = connect(&args.name)?;
            client.set_policy(Some(text))?;
            warn_of_absent(&policy, &mut client)?;
        }
        Action::Show(args) => {
            let text = connect(&args.name)?.policy()?;
            print(text.as_deref().unwrap_or(NO_POLICY))?;
        }
        Action::Clear(args) => connect(&args.name)?.set_policy(None)?,
        Action::Check(args) => {
            let (policy, _) = read(&args.file)?;
            match Client::connect(&RuntimeDir::from_env(), args.name.get())? {
                Some(mut client) => warn_of_absent(&policy, &mut client)?,
                None if args.name.is_given() => drop(connect(&args.name)?),
                None => {}
            }
            let rules = policy.rules().len();
            let default = policy.default_action().words();
            print(&format!("{rules} rules, default {default}\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Warns of guests and groups of the policy that the network does not have: a name with a typo lets its
/// guest do what the rule denies.
fn warn_of_absent(policy: &Policy, client: &mut Client) -> Result<(), Failure> {
    let ports = client.status()?.ports;
    for warning in absent(policy, &ports) {
        log::warn!("{warning}");
    }
    Ok(())
}

fn absent(policy: &Policy, ports: &[PortStatus]) -> Vec<String> {
    let mut warned = Vec::new();
    let mut warnings = Vec::new();
    for (rule, term) in policy
        .rules()
        .iter()
        .flat_map(|rule| rule.guests.iter().map(move |term| (rule, term)))
    {
        let is_there = ports.iter().any(|port| match term {
            GuestTerm::Port(name) => port.name == name.as_str(),
            GuestTerm::Group(group) => port.group.as_deref() == Some(group.as_str()),
        });
        if is_there || warned.contains(&term) {
            continue;
        }
        warned.push(term);
        let line = rule.line;
        warnings.push(match term {
            GuestTerm::Port(name) => {
                format!("line {line}: no guest is called {name} at the moment")
            }
            GuestTerm::Group(group) => {
                format!("line {line}: no guest is of the group {group} at the moment")
            }
        });
    }
    warnings
}

/// The policy in a file, and its text.
///
/// # Errors
/// It can't be read, or is wrong: where and why.
pub(super) fn read(path: &Path) -> Result<(Policy, String), Failure> {
    let shown = path.display();
    let mut bytes = Vec::new();
    // One byte more than may be, for the parser to complain of.
    let limit = TEXT_LEN_MAX as u64 + 1;
    if path.as_os_str() == "-" {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    }
    .map_err(Failure::io(format!("cannot read the policy {shown}")))?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Failure::Usage(format!("{shown}: is not text in UTF-8")))?;
    match text.parse() {
        Ok(policy) => Ok((policy, text)),
        Err(error) => Err(Failure::Usage(format!("{shown}: {error}"))),
    }
}

/// Appends what a policy did, as tables.
pub(super) fn render(text: &mut String, policy: &PolicyView) {
    let row = |line: &str, rule: &str, flows: u64, queries: u64| {
        [line, rule, &flows.to_string(), &queries.to_string()].map(str::to_owned)
    };
    let mut rows: Vec<_> = policy
        .rules
        .iter()
        .map(|rule| {
            let line = rule.line.to_string();
            row(&line, &printable(&rule.rule), rule.flows, rule.queries)
        })
        .collect();
    let default = format!("default {}", policy.default);
    rows.push(row(
        "-",
        &default,
        policy.default_flows,
        policy.default_queries,
    ));
    for (why, count) in [
        ("denied: the address has no name", policy.nameless),
        ("denied: another resolver", policy.resolver),
        ("denied: unknown guest", policy.stranger),
    ] {
        if count != 0 {
            rows.push(row("-", why, count, 0));
        }
    }
    table(
        text,
        &["POLICY", "RULE", "FLOWS", "QUERIES"],
        "><>>",
        rows.into_iter().map(Vec::from).collect(),
    );
    table(
        text,
        &["DENIED", "GUEST", "WHAT", "NAME", "WHY", "TIMES"],
        "<<<<<>",
        policy.denied.iter().map(denied_row).collect(),
    );
}

fn denied_row(denied: &DeniedView) -> Vec<String> {
    let what = match (denied.to, denied.to_port) {
        (Some(to), Some(port)) => format!("{} {}", denied.protocol, SocketAddr::new(to, port)),
        (Some(to), None) => format!("{} {}", denied.protocol, IpAddr::to_string(&to)),
        (None, _) => format!("{} query", denied.protocol),
    };
    let guest = denied.guest.clone();
    vec![
        format!("{} ago", uptime(Duration::from_secs(denied.secs_ago))),
        printable(&guest.unwrap_or_else(|| denied.port.to_string())),
        what,
        denied.name.clone().unwrap_or_else(|| "-".to_owned()),
        match denied.line {
            Some(line) => format!("line {line}"),
            None => denied.cause.clone(),
        },
        denied.count.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat::policy::ledger::RuleView;

    #[test]
    fn what_a_policy_did() {
        let denied = DeniedView {
            secs_ago: 61,
            count: 3,
            port: 2,
            guest: Some("web".to_owned()),
            protocol: "tcp".to_owned(),
            to: Some("2001:db8::1".parse().unwrap()),
            to_port: Some(443),
            name: None,
            line: None,
            cause: "address without a name".to_owned(),
        };
        let query = DeniedView {
            guest: None,
            protocol: "dns".to_owned(),
            to: None,
            to_port: None,
            name: Some("evil.test".to_owned()),
            line: Some(7),
            ..denied.clone()
        };
        let view = PolicyView {
            rules: vec![RuleView {
                line: 7,
                rule: "allow to *.example.test".to_owned(),
                flows: 12,
                queries: 4,
            }],
            default: "deny silent".to_owned(),
            nameless: 3,
            denied: vec![denied, query],
            ..PolicyView::default()
        };
        let mut text = String::new();
        render(&mut text, &view);
        assert_eq!(
            text,
            "
POLICY  RULE                             FLOWS  QUERIES
     7  allow to *.example.test             12        4
     -  default deny silent                  0        0
     -  denied: the address has no name      3        0

DENIED        GUEST  WHAT                   NAME       WHY                     TIMES
00:01:01 ago  web    tcp [2001:db8::1]:443  -          address without a name      3
00:01:01 ago  2      dns query              evil.test  line 7                      3
"
        );
    }

    #[test]
    fn guests_that_the_network_does_not_have() {
        let port = |name: &str, group: Option<&str>| PortStatus {
            name: name.to_owned(),
            group: group.map(str::to_owned),
            ..PortStatus::default()
        };
        let ports = [port("web", None), port("ci-1", Some("build"))];
        let policy = "deny guest port=Web,port=Wbe,group=build to any\n\
                      deny guest group=bulid,port=wbe to any\ndefault allow\n";
        assert_eq!(
            absent(&policy.parse().unwrap(), &ports),
            [
                "line 1: no guest is called wbe at the moment",
                "line 2: no guest is of the group bulid at the moment"
            ]
        );
    }

    #[test]
    fn what_is_shown_without_a_policy_is_one() {
        let policy: Policy = NO_POLICY.parse().unwrap();
        assert_eq!(policy.to_string(), "default allow\n");
    }

    #[test]
    fn files_are_refused_with_their_line() {
        let path = std::env::temp_dir().join(format!("lanlet-policy-{}", std::process::id()));
        let refusal = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            match read(&path) {
                Err(Failure::Usage(why)) => why.replace(path.to_str().unwrap(), "FILE"),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(
            refusal(b"# fine\nallow to x.test ftp\ndefault deny\n")
                .split_once(": ")
                .unwrap(),
            (
                "FILE",
                "line 2: ftp: is no protocol (tcp, udp, icmp, or any alone)"
            )
        );
        assert!(refusal(b"default deny # \xff\n").contains("UTF-8"));
        let long = [&b"default deny\n"[..], &vec![b'#'; TEXT_LEN_MAX]].concat();
        assert!(refusal(&long).contains("longer than"));
        std::fs::write(&path, "default deny\n").unwrap();
        assert_eq!(read(&path).unwrap().0.rules().len(), 0);
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(read(&path), Err(Failure::Runtime(_))));
    }
}
