//! `lanlet forward`, and the flags by which other commands make forwards.

use std::fmt::Write;
use std::process::ExitCode;

use super::find::connect;
use super::options::NameOption;
use super::status::{printable, table};
use super::{Failure, complete, print};
use crate::nat::forward::ForwardSpec;
use crate::network::ForwardStatus;

/// Add, list and remove port forwards of a running network
///
/// A forward is written in docker's form or in QEMU's, see 'lanlet forward add --help'.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet forward add 8080:192.168.122.70:80
  lanlet forward list
  lanlet forward remove 1")]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand, Debug)]
enum Action {
    Add(AddArgs),
    List(ListArgs),
    Remove(RemoveArgs),
}

/// Add forwards to a running network, until they are removed
///
/// FORWARD is one of
///   [ADDR:][PORT[-END]:]GUEST:PORT[-END][/tcp|/udp]  docker's form; without PORT the host chooses
///   {tcp|udp}:[ADDR]:PORT-GUEST:PORT                 QEMU's hostfwd
///   unix:PATH-GUEST:PORT                             clients of a unix socket reach a guest
///   [tcp]:[ADDR]:PORT-unix:PATH                      QEMU's guestfwd: guests reach a unix socket
/// GUEST is an address, a MAC or the name of a lease or port; it is looked up for each connection.
/// IPv6 and MAC addresses stand in brackets. After a comma: name=NAME, interface=IFNAME (only what
/// comes in by it, nothing of the host itself), client-address (the guest sees the client's address
/// in place of the gateway's), max=N (connections or UDP sessions at a time; more clients wait),
/// allow-guests (guests of 'lanlet exec' may be clients of a unix socket).
#[derive(clap::Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Examples:
  lanlet forward add 8080:192.168.122.70:80
  lanlet forward add 127.0.0.1:2222:web:22,name=ssh '[::1]:5353:[fd00::5]:53/udp'
  lanlet forward add 8000-8010:[52:54:00:12:34:56]:8000-8010,client-address
  lanlet forward add unix:/run/user/1000/web.sock-web:80
  lanlet forward add tcp::5432-unix:/run/postgresql/.s.PGSQL.5432"
)]
struct AddArgs {
    #[command(flatten)]
    name: NameOption,
    /// What to forward where
    #[arg(required = true, value_name = "FORWARD")]
    forwards: Vec<ForwardSpec>,
}

/// List the forwards of a running network
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet forward list
  lanlet forward list --name lab --json")]
struct ListArgs {
    #[command(flatten)]
    name: NameOption,
    /// The same as one JSON array, with stable names
    #[arg(long)]
    json: bool,
}

/// Remove forwards from a running network
///
/// Connections that came in by them go on, UDP exchanges end.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet forward remove 3
  lanlet forward remove ssh 8080:192.168.122.70:80")]
struct RemoveArgs {
    #[command(flatten)]
    name: NameOption,
    /// Number, name or the words of a forward
    #[arg(required = true, value_name = "FORWARD", add = complete::forwards())]
    forwards: Vec<String>,
}

/// Forwards that a command makes.
#[derive(clap::Args, Debug, Default)]
#[command(next_help_heading = "Forwards, which live as long as the command")]
pub(super) struct ForwardFlags {
    /// Forward a port of the host, as docker does: [ADDR:]PORT[-END]:[GUEST:]PORT[-END][/udp]. GUEST is
    /// an address, a MAC or a name; 'lanlet forward add --help' has more
    #[arg(short, long, value_name = "FORWARD", value_parser = ForwardSpec::from_publish)]
    publish: Vec<ForwardSpec>,

    /// Forward a port or unix socket of the host, as QEMU writes it: [tcp|udp]:[ADDR]:PORT-[GUEST]:PORT
    #[arg(long, value_name = "FORWARD", value_parser = ForwardSpec::from_hostfwd)]
    hostfwd: Vec<ForwardSpec>,

    /// Let guests reach a unix socket of the host, as QEMU writes it: [tcp]:[ADDR]:PORT-unix:PATH
    #[arg(long, value_name = "FORWARD", value_parser = ForwardSpec::from_guestfwd)]
    guestfwd: Vec<ForwardSpec>,
}

impl ForwardFlags {
    /// All of them.
    pub(super) fn specs(&self) -> impl Iterator<Item = &ForwardSpec> {
        self.publish
            .iter()
            .chain(&self.hostfwd)
            .chain(&self.guestfwd)
    }
}

pub(super) fn forward(args: &Args) -> Result<ExitCode, Failure> {
    match &args.action {
        Action::Add(args) => add(args),
        Action::List(args) => list(args),
        Action::Remove(args) => remove(args),
    }
}

/// All of them, or none.
fn add(args: &AddArgs) -> Result<ExitCode, Failure> {
    let mut client = connect(&args.name)?;
    let mut added: Vec<ForwardStatus> = Vec::new();
    for forward in &args.forwards {
        match client.add_forward(forward, false) {
            Ok(forward) => added.push(forward),
            Err(error) => {
                for forward in &added {
                    client.remove_forward(&forward.id.to_string())?;
                }
                return Err(error.into());
            }
        }
    }
    let mut text = String::new();
    for ForwardStatus { id, forward, .. } in added {
        let _ = writeln!(text, "forward {id}: {forward}");
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn list(args: &ListArgs) -> Result<ExitCode, Failure> {
    let forwards = connect(&args.name)?.forwards()?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&forwards).map_err(std::io::Error::from)? + "\n",
        false => {
            let mut text = String::new();
            render(&mut text, &forwards);
            text.trim_start().to_owned()
        }
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn remove(args: &RemoveArgs) -> Result<ExitCode, Failure> {
    let mut client = connect(&args.name)?;
    for forward in &args.forwards {
        client.remove_forward(forward)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Appends the table of forwards.
pub(super) fn render(text: &mut String, forwards: &[ForwardStatus]) {
    let row = |forward: &ForwardStatus| {
        vec![
            forward.id.to_string(),
            printable(&forward.forward),
            forward.opened.to_string(),
            forward.waiting.to_string(),
            forward.refused.to_string(),
        ]
    };
    let heads = ["FORWARD", "", "OPENED", "WAITING", "REFUSED"];
    table(text, &heads, "><>>>", forwards.iter().map(row).collect());
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args as _, CommandFactory as _};

    /// All texts that a form of the help stands for: `[x]` is x or nothing, `a|b` in brackets or braces
    /// one of them.
    fn variants(form: &str) -> Vec<String> {
        let Some(at) = form.find(['[', '{']) else {
            return vec![form.to_owned()];
        };
        let mut depth = 0;
        let end = form[at..].find(|c| {
            depth += i32::from("[{".contains(c)) - i32::from("]}".contains(c));
            depth == 0
        });
        let end = at + end.expect("closed");
        let mut choices: Vec<&str> = form[at + 1..end].split('|').collect();
        if form[at..].starts_with('[') {
            choices.push("");
        }
        let chosen = choices.into_iter().flat_map(variants);
        let rest = variants(&form[end + 1..]);
        chosen
            .flat_map(|chosen| {
                let all = rest.iter();
                let whole = all.map(move |rest| format!("{}{chosen}{rest}", &form[..at]));
                whole.collect::<Vec<_>>()
            })
            .collect()
    }

    /// Forms with examples in place of their words.
    fn examples(form: &str) -> Vec<String> {
        let guests = ["web", "192.168.122.70", "[52:54:00:12:34:56]", "[fd00::5]"];
        let addresses = ["192.168.1.5", "10.0.2.4"];
        let mut examples = Vec::new();
        // Ranges have two ends.
        for text in variants(form)
            .iter()
            .filter(|text| text.matches("END").count() != 1)
        {
            for guest in guests {
                for address in addresses {
                    let text = text.replace("ADDR", address).replace("GUEST", guest);
                    let text = text.replace("PORT", "8000").replace("END", "8009");
                    examples.push(text.replace("PATH", "/run/x.sock"));
                }
            }
        }
        examples
    }

    #[test]
    fn every_form_of_the_help_is_read() {
        let help = AddArgs::augment_args(clap::Command::new("add"))
            .get_long_about()
            .unwrap()
            .to_string();
        let forms: Vec<&str> = help
            .lines()
            .filter(|line| line.starts_with("  ") && line.contains("PORT"))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        assert_eq!(forms.len(), 4, "{help}");
        for text in forms.into_iter().flat_map(examples) {
            let spec: Result<ForwardSpec, _> = text.parse();
            let spec = spec.unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(
                spec.to_string().parse::<ForwardSpec>().unwrap(),
                spec,
                "{text}"
            );
        }
        let web: ForwardSpec = "web:80".parse().unwrap();
        assert_eq!(web, "0:web:80/tcp".parse().unwrap());

        #[derive(clap::Parser)]
        struct Flags {
            #[command(flatten)]
            forwards: ForwardFlags,
        }
        let command = Flags::command();
        type Read = fn(&str) -> Result<ForwardSpec, crate::nat::forward::ForwardError>;
        let flags: [(&str, Read); 3] = [
            ("publish", ForwardSpec::from_publish),
            ("hostfwd", ForwardSpec::from_hostfwd),
            ("guestfwd", ForwardSpec::from_guestfwd),
        ];
        for (flag, read) in flags {
            let flag = command
                .get_arguments()
                .find(|argument| argument.get_id() == flag)
                .unwrap();
            let help = flag.get_help().unwrap().to_string();
            let form = help
                .split_whitespace()
                .find(|word| word.contains("PORT"))
                .unwrap();
            for text in examples(form.trim_end_matches('.')) {
                read(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
            }
        }
    }

    #[test]
    fn the_list() {
        let forward = |id, text: &str, opened| ForwardStatus {
            id,
            forward: text.to_owned(),
            opened,
            refused: 2,
            ..ForwardStatus::default()
        };
        let mut text = String::new();
        render(
            &mut text,
            &[
                forward(1, "8080:web:80,name=site", 17),
                forward(12, "0.0.0.0:53:web:53/udp", 1),
            ],
        );
        assert_eq!(
            text,
            "
FORWARD                         OPENED  WAITING  REFUSED
      1  8080:web:80,name=site      17        0        2
     12  0.0.0.0:53:web:53/udp       1        0        2
"
        );
        text.clear();
        render(&mut text, &[]);
        assert_eq!(text, "");
    }
}
