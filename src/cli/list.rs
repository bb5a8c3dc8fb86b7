//! `lanlet list`: the networks that run.

use std::process::ExitCode;

use serde::Serialize;

use super::screen::{self, age};
use super::status::{printable, table};
use super::{Failure, print};
use crate::control::client::Client;
use crate::control::{Running, RuntimeDir, is_private};
use crate::network::Status;

/// List the running networks, those that commands have for themselves included
///
/// The network of a 'run', 'qemu' or 'exec' that attached to none is called after the command and its
/// process, like exec-1234, and ends with it; 'status', 'forward' and the others take that name, too.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet list
  lanlet list --json | jq -r '.[] | select(.guests == 0) | .name'")]
pub(super) struct Args {
    /// The same as one JSON array, with stable names
    #[arg(long)]
    json: bool,
}

/// One network.
#[derive(Serialize)]
struct Network {
    name: String,
    /// Process that runs it.
    pid: Option<u32>,
    /// It ends with the command that it is for.
    private: bool,
    #[serde(flatten)]
    answer: Answer,
}

/// What it says of itself.
#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Is {
        subnet: String,
        guests: usize,
        uptime_secs: u64,
        command: String,
    },
    Error {
        error: String,
    },
}

pub(super) fn list(args: &Args) -> Result<ExitCode, Failure> {
    let dir = RuntimeDir::from_env();
    dir.sweep();
    let running = dir.running()?;
    // One that does not answer holds the others up no longer than itself.
    let networks: Vec<Network> = std::thread::scope(|scope| {
        let asked: Vec<_> = running
            .into_iter()
            .map(|network| scope.spawn(|| ask(&dir, network)))
            .collect();
        let answers = asked.into_iter().filter_map(|thread| thread.join().ok());
        answers.flatten().collect()
    });
    let text = match args.json {
        true => serde_json::to_string_pretty(&networks).map_err(std::io::Error::from)? + "\n",
        false => render(&networks, screen::columns()),
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Asks a network; `None`: it has ended meanwhile.
fn ask(dir: &RuntimeDir, network: Running) -> Option<Network> {
    let told = Client::connect(dir, &network.name)
        .and_then(|client| client.map(|mut client| client.status()).transpose());
    let answer = match told {
        Ok(None) => return None,
        Ok(Some(status)) => Answer::of(status),
        Err(error) => Answer::Error {
            error: error.to_string(),
        },
    };
    Some(Network {
        private: is_private(&network.name),
        name: network.name,
        pid: network.pid,
        answer,
    })
}

impl Answer {
    fn of(status: Status) -> Self {
        Answer::Is {
            guests: status.guest_ports(),
            subnet: status.subnet,
            uptime_secs: status.uptime_secs,
            command: status.command,
        }
    }
}

/// `columns`: of the terminal, if it is one.
fn render(networks: &[Network], columns: Option<usize>) -> String {
    let row = |network: &Network| {
        let (subnet, guests, since, command) = match &network.answer {
            Answer::Is {
                subnet,
                guests,
                uptime_secs,
                command,
            } => (
                subnet.clone(),
                guests.to_string(),
                age(*uptime_secs),
                printable(command),
            ),
            Answer::Error { error } => {
                let none = || "-".to_owned();
                (none(), none(), none(), printable(error))
            }
        };
        let pid = network.pid.map_or("-".to_owned(), |pid| pid.to_string());
        vec![network.name.clone(), pid, subnet, guests, since, command]
    };
    let heads = ["NAME", "PID", "SUBNET", "GUESTS", "SINCE", "COMMAND"];
    let mut text = String::new();
    table(
        &mut text,
        &heads,
        "<><>><",
        networks.iter().map(row).collect(),
    );
    let text = text.trim_start();
    columns.map_or_else(|| text.to_owned(), |columns| screen::cut(text, columns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list() {
        let network = |name: &str, answer| Network {
            name: name.to_owned(),
            pid: Some(4711),
            private: is_private(name),
            answer,
        };
        let networks = [
            network(
                "default",
                Answer::Is {
                    subnet: "192.168.122.0/24".to_owned(),
                    guests: 12,
                    uptime_secs: 7300,
                    command: "lanlet up -d".to_owned(),
                },
            ),
            network(
                "exec-4711",
                Answer::Error {
                    error: "does not answer".to_owned(),
                },
            ),
        ];
        assert_eq!(
            render(&networks, Some(60)),
            "\
NAME        PID  SUBNET            GUESTS  SINCE  COMMAND
default    4711  192.168.122.0/24      12     2h  lanlet up…
exec-4711  4711  -                      -      -  does not …
"
        );
        let json = serde_json::to_value(&networks).unwrap();
        assert_eq!(json[0]["guests"], 12);
        assert_eq!(
            (&json[1]["private"], &json[0]["private"]),
            (&true.into(), &false.into())
        );
        assert_eq!(json[1]["error"], "does not answer");
        assert_eq!(render(&[], None), "");
    }
}
