//! What a shell's completion offers beside commands and flags: networks, guests, forwards, programs.
//!
//! The shell runs this program with [`VARIABLE`] in the environment and the words of the command line; the
//! words are offered from the same table as `--help` is made of. A completion that can't be had is none:
//! nothing is printed that is no candidate.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::CompleteEnv;
use clap_complete::engine::{
    ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use clap_complete::env::Shells;

use super::{Cli, Failure};
use crate::config::NAME_DEFAULT;
use crate::control::RuntimeDir;
use crate::control::client::Client;

/// The variable by which a shell asks; its own, as another program's would make lanlet answer to it.
const VARIABLE: &str = "LANLET_COMPLETE";

/// Answers a shell that asks for completions, and ends the process then.
pub(super) fn answer() {
    if std::env::var_os(VARIABLE).is_some() {
        log::set_max_level(log::LevelFilter::Off);
        CompleteEnv::with_factory(Cli::command)
            .var(VARIABLE)
            .complete();
    }
}

/// What a shell reads to ask.
///
/// # Errors
/// The shell is none that can ask.
pub(super) fn script(shell: &str) -> Result<String, Failure> {
    let shells = Shells::builtins();
    let shell = shells
        .completer(shell)
        .ok_or_else(|| Failure::Usage(format!("no completions for {shell}")))?;
    let mut text = Vec::new();
    shell.write_registration(VARIABLE, "lanlet", "lanlet", "lanlet", &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Names of running networks.
pub(super) fn networks() -> ArgValueCompleter {
    ArgValueCompleter::new(|word: &OsStr| {
        let running = RuntimeDir::from_env().running().unwrap_or_default();
        starting_with(
            word,
            running.into_iter().map(|network| (network.name, None)),
        )
    })
}

/// Names of guests of the network that the command line names.
pub(super) fn guests() -> ArgValueCompleter {
    ArgValueCompleter::new(|word: &OsStr| {
        let status = network().and_then(|mut client| client.status().ok());
        let guests = status.map(|status| status.guests).unwrap_or_default();
        let names = guests.into_iter().map(|guest| {
            let help = guest.ipv4.first().map(ToString::to_string);
            (guest.name, help)
        });
        starting_with(word, names)
    })
}

/// Numbers of forwards of the network that the command line names.
pub(super) fn forwards() -> ArgValueCompleter {
    ArgValueCompleter::new(|word: &OsStr| {
        let forwards = network().and_then(|mut client| client.forwards().ok());
        let ids = forwards.unwrap_or_default().into_iter();
        starting_with(
            word,
            ids.map(|forward| (forward.id.to_string(), Some(forward.forward))),
        )
    })
}

/// Programs in PATH, and files: a command and its arguments.
pub(super) fn command() -> ArgValueCompleter {
    ArgValueCompleter::new(|word: &OsStr| {
        let mut found = PathCompleter::any().complete(word);
        if !word.as_encoded_bytes().contains(&b'/') && !word.is_empty() {
            let programs = programs().into_iter().map(|name| (name, None));
            found.extend(starting_with(word, programs));
        }
        found
    })
}

fn programs() -> BTreeSet<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_program = |entry: &std::fs::DirEntry| {
        let meta = std::fs::metadata(entry.path());
        meta.is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&path)
        .filter(|directory| directory != Path::new(""))
        .filter_map(|directory| directory.read_dir().ok())
        .flat_map(|entries| entries.flatten())
        .filter(is_program)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// The network that the command line names by --name; else the one that is meant without.
fn network() -> Option<Client> {
    let dir = RuntimeDir::from_env();
    let words: Vec<_> = std::env::args().collect();
    let named = words.iter().zip(words.iter().skip(1));
    let named = named
        .filter(|(flag, _)| *flag == "--name")
        .map(|(_, name)| name.clone());
    let joined = words
        .iter()
        .filter_map(|word| word.strip_prefix("--name=").map(str::to_owned));
    let name = named.chain(joined).last();
    let connect = |name: &str| Client::connect(&dir, name).ok().flatten();
    match name {
        Some(name) => connect(&name),
        None => connect(NAME_DEFAULT).or_else(|| match &dir.running().ok()?[..] {
            [only] => connect(&only.name),
            _ => None,
        }),
    }
}

fn starting_with(
    word: &OsStr,
    candidates: impl Iterator<Item = (String, Option<String>)>,
) -> Vec<CompletionCandidate> {
    let Some(word) = word.to_str() else {
        return Vec::new();
    };
    candidates
        .filter(|(candidate, _)| candidate.starts_with(word))
        .map(|(candidate, help)| CompletionCandidate::new(candidate).help(help.map(Into::into)))
        .collect()
}
