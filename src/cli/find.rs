//! Which running network a command is about.

use super::Failure;
use super::options::NameOption;
use crate::config::NAME_DEFAULT;
use crate::control::client::Client;
use crate::control::{ControlError, RuntimeDir};

/// The network that is named; else `default` if it runs; else the only one that runs.
///
/// # Errors
/// There is none, or more than one may be meant.
pub(super) fn connect(name: &NameOption) -> Result<Client, Failure> {
    let dir = RuntimeDir::from_env();
    match find(&dir, name)? {
        Some(client) => Ok(client),
        None => Err(not_running(&dir, name.get()).into()),
    }
}

/// As [`connect`]; `None`: the network that is meant does not run.
///
/// # Errors
/// More than one may be meant, or the one can't be talked to.
pub(super) fn find(dir: &RuntimeDir, name: &NameOption) -> Result<Option<Client>, Failure> {
    if let Some(client) = Client::connect(dir, name.get())? {
        return Ok(Some(client));
    }
    if name.is_given() {
        return Ok(None);
    }
    let running = dir.running()?;
    match &running[..] {
        [] => Ok(None),
        [only] => Ok(Client::connect(dir, &only.name)?),
        several => {
            let names: Vec<_> = several.iter().map(|network| &*network.name).collect();
            Err(Failure::because(format!(
                "no network '{NAME_DEFAULT}' is running, and several others are: say which with --name \
                 ({}; 'lanlet list' has more of them)",
                names.join(", ")
            )))
        }
    }
}

/// The error for a network that does not run, which names those that do.
pub(super) fn not_running(dir: &RuntimeDir, name: &str) -> ControlError {
    let running = dir.running().unwrap_or_default();
    ControlError::NotRunning {
        name: name.to_owned(),
        running: running.into_iter().map(|network| network.name).collect(),
    }
}
