//! `lanlet wait`: until a network runs.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::Failure;
use super::find::{find, not_running};
use super::options::NameOption;
use crate::config;
use crate::control::RuntimeDir;
use crate::control::client::Client;

/// Pause between two looks: what waits is a script, and a guest takes seconds to boot.
const POLL: Duration = Duration::from_millis(100);

/// Wait until a network runs
///
/// Ends with status 0 as soon as the network answers; with 1 if that takes longer than the time given.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet wait
  lanlet wait --name lab --timeout 2m")]
pub(super) struct Args {
    #[command(flatten)]
    name: NameOption,
    /// How long to wait at most [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = config::parse_duration, default_value = "30s",
        hide_default_value = true)]
    timeout: Duration,
}

pub(super) fn wait(args: &Args) -> Result<ExitCode, Failure> {
    let deadline = Instant::now() + args.timeout;
    let dir = RuntimeDir::from_env();
    match args.name.is_given() {
        true => Client::connect_by(&dir, args.name.get(), deadline)?,
        false => any_by(&dir, &args.name, deadline)?,
    }
    .map(drop)
    .ok_or_else(|| not_running(&dir, args.name.get()))?;
    Ok(ExitCode::SUCCESS)
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
