//! `lanlet wait`: until a network runs and its guests are there.

use std::collections::HashSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::Failure;
use super::find::{find, not_running};
use super::options::NameOption;
use crate::config;
use crate::control::RuntimeDir;
use crate::control::client::Client;
use crate::network::Status;

/// Pause between two looks: what waits is a script, and a guest takes seconds to boot.
const POLL: Duration = Duration::from_millis(100);

/// Wait until a network runs, and until guests are on it
///
/// Ends with status 0 as soon as the network answers and has so many guests; with 1 if that takes longer
/// than the time given. A guest counts once 'status' shows an address of it: it has a lease, or was heard
/// with an address of its own. Several behind one port count as one.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet wait
  lanlet wait --name lab --guests 2 --timeout 2m")]
pub(super) struct Args {
    #[command(flatten)]
    name: NameOption,
    /// How many guests to wait for
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    guests: usize,
    /// How long to wait at most [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = config::parse_duration, default_value = "30s",
        hide_default_value = true)]
    timeout: Duration,
}

pub(super) fn wait(args: &Args) -> Result<ExitCode, Failure> {
    let deadline = Instant::now() + args.timeout;
    let dir = RuntimeDir::from_env();
    let mut client = match args.name.is_given() {
        true => Client::connect_by(&dir, args.name.get(), deadline)?,
        false => any_by(&dir, &args.name, deadline)?,
    }
    .ok_or_else(|| not_running(&dir, args.name.get()))?;
    if args.guests > 0 {
        wait_for_guests(&mut client, args, deadline)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until so many guests have addresses.
fn wait_for_guests(client: &mut Client, args: &Args, deadline: Instant) -> Result<(), Failure> {
    loop {
        let present = guests_with_address(&client.status()?);
        if present >= args.guests {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Failure::because(format!(
                "network '{}' has {present} of {} guests after {}",
                client.name(),
                args.guests,
                config::format_duration(args.timeout)
            )));
        }
        std::thread::sleep(POLL);
    }
}

/// The network that is meant where none is named, as soon as it runs.
fn any_by(
    dir: &RuntimeDir,
    name: &NameOption,
    deadline: Instant,
) -> Result<Option<Client>, Failure> {
    loop {
        let found = find(dir, name)?;
        if found.is_some() || Instant::now() >= deadline {
            return Ok(found);
        }
        std::thread::sleep(POLL);
    }
}

/// How many ports have a guest whose address is known.
fn guests_with_address(status: &Status) -> usize {
    let known = status.guests.iter().filter(|guest| guest.has_address());
    known.map(|guest| guest.port).collect::<HashSet<_>>().len()
}
