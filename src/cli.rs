//! The command line: the table of commands and flags, from which `--help`, the man pages and the
//! shell completions come, and the one place that prints errors.
//!
//! Exit status: that of the command run, else 0; 1 when something failed at run time; 2 when the
//! command line or the configuration is wrong. Output that nobody reads (a closed pipe) is no error.

mod attachment;
mod bench;
mod check;
mod child;
mod complete;
mod daemon;
mod demo;
mod docs;
mod exec;
mod find;
mod forward;
mod guests;
mod into;
mod join;
mod lan;
mod list;
mod logger;
mod options;
mod policy;
mod qemu;
mod run;
mod screen;
mod signals;
mod status;
mod up;
mod wait;

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, Parser, Subcommand};

use crate::config::ConfigError;
use crate::control::ControlError;
use crate::network::NetworkError;
use crate::sys::harden;
use crate::tap::TapError;

/// Exit status for a wrong command line, as clap has it.
const EXIT_USAGE: u8 = 2;

/// A little LAN in one process: a rootless virtual switch with DHCP, DNS and NAT for VMs.
#[derive(Parser, Debug)]
#[command(
    name = "lanlet",
    bin_name = "lanlet",
    version,
    propagate_version = false,
    max_term_width = 100,
    long_about = "A little LAN in one process: a rootless virtual switch with DHCP, DNS and NAT for \
                  VMs.\n\nA network has a name ('default' unless --name says otherwise). 'lanlet up' \
                  runs one; run, qemu and exec attach to it. Where they name none and 'default' is not \
                  running, they start a private one that lives as long as their command. Nothing needs \
                  root.",
    after_help = "\
Examples:
  lanlet qemu -- -m 1G -drive file=disk.qcow2       a VM on a LAN of its own
  lanlet up -d                                      a LAN that several VMs share
  lanlet qemu -- -m 1G -drive file=one.qcow2
  lanlet run cloud-hypervisor --net fd={fd},mac={mac} --kernel vmlinuz
  lanlet exec bash                                  a shell on the LAN, no VM
  lanlet qemu -p 2222:22 -- -m 1G disk.qcow2        the VM's port 22 is the host's 2222
  lanlet status                                     who is there, and what was dropped
  lanlet check                                      what this machine can do
  lanlet bench --quick                              how fast it is here, beside its peers

'lanlet COMMAND --help' has the details of a command.",
    after_long_help = "\
Examples:
  lanlet qemu -- -m 1G -drive file=disk.qcow2       a VM on a LAN of its own
  lanlet up -d                                      a LAN that several VMs share
  lanlet qemu -- -m 1G -drive file=one.qcow2
  lanlet run cloud-hypervisor --net fd={fd},mac={mac} --kernel vmlinuz
  lanlet exec bash                                  a shell on the LAN, no VM
  lanlet qemu -p 2222:22 -- -m 1G disk.qcow2        the VM's port 22 is the host's 2222
  lanlet status                                     who is there, and what was dropped
  lanlet check                                      what this machine can do
  lanlet bench --quick                              how fast it is here, beside its peers

Environment:
  LANLET_RUNTIME_DIR  where the control sockets are; else $XDG_RUNTIME_DIR/lanlet, else /run/lanlet
                      for root, else /tmp/lanlet-UID
  LANLET_LOG          error, warn, info, debug or trace: what goes to stderr (-v and -q come on top)
  LANLET_LAB          where 'lanlet demo' finds its lab

Exit status:
  that of the command run (128 + N when signal N ended it), else 0; 1 when something failed;
  2 when the command line is wrong; 126 or 127 when the command could not be run."
)]
pub struct Cli {
    /// More on stderr: -v for ports and leases, -vv for each packet that is refused.
    #[arg(short, long, action = ArgAction::Count, global = true, display_order = 900)]
    verbose: u8,

    /// Less is said: -q for warnings only (and no summary of 'up'), -qq for errors only.
    #[arg(short, long, action = ArgAction::Count, global = true, display_order = 901)]
    quiet: u8,

    #[command(subcommand)]
    command: Command,
}

/// The commands, in the order the help shows them.
#[derive(Subcommand, Debug)]
enum Command {
    Up(up::Args),
    Run(run::Args),
    Qemu(qemu::Args),
    Exec(exec::Args),
    Join(join::Args),
    List(list::Args),
    Wait(wait::Args),
    Status(status::Args),
    Ip(guests::IpArgs),
    Forward(forward::Args),
    Policy(policy::Args),
    Down(up::DownArgs),
    Demo(demo::Args),
    Bench(bench::Args),
    Check(check::Args),
    Man(docs::ManArgs),
    Completions(docs::CompletionsArgs),
}

/// What lanlet starts itself as. A table of its own: no help, page or completion knows of it.
#[derive(Parser, Debug)]
#[command(name = "lanlet", disable_help_subcommand = true)]
enum Internal {
    /// Does a part of a bench.
    BenchPeer(bench::PeerArgs),
    /// Becomes a command with its signals and its parent's death arranged.
    ChildInit(child::InitArgs),
    /// Becomes a command in a namespace whose link is a port.
    GuestInit(exec::InitArgs),
    /// Becomes a command in the namespaces of a guest.
    IntoInit(into::InitArgs),
    /// Makes a guest of a namespace.
    JoinInit(exec::InitArgs),
    /// Serves the namespace with the VMMs' taps.
    #[command(name = crate::tap::HELPER_SUBCOMMAND)]
    NetnsHelper,
}

impl Internal {
    /// The command line, if it is one of these.
    fn parse() -> Option<Self> {
        let word = std::env::args_os().nth(1)?;
        let is_ours = Self::command()
            .get_subcommands()
            .any(|command| word == command.get_name());
        is_ours.then(<Self as Parser>::parse)
    }
}

/// Why a command ended early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line or the configuration is wrong.
    Usage(String),
    /// Something went wrong at run time.
    Runtime(Box<dyn Error>),
    /// It was reported already.
    Reported,
}

impl Failure {
    /// A run-time failure said in words.
    fn because(message: impl Into<String>) -> Self {
        Failure::Runtime(message.into().into())
    }

    /// A failed system call, with what was tried.
    fn io(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |error| match error.kind() {
            io::ErrorKind::BrokenPipe => error.into(),
            _ => Failure::because(format!("{what}: {error}")),
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Usage(message) => f.write_str(message),
            Failure::Runtime(error) => f.write_str(&chain(&**error)),
            Failure::Reported => f.write_str("see above"),
        }
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        Failure::Runtime(error.into())
    }
}

impl From<NetworkError> for Failure {
    fn from(error: NetworkError) -> Self {
        match error {
            NetworkError::Config(error) => error.into(),
            error => Failure::Runtime(error.into()),
        }
    }
}

impl From<TapError> for Failure {
    fn from(error: TapError) -> Self {
        Failure::Runtime(error.into())
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Failure::Usage(format!("--{error}"))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Runtime(error.into())
    }
}

/// The program: reads the command line, runs the command, prints what failed.
pub fn main() -> ExitCode {
    if let Some(internal) = Internal::parse() {
        logger::init(0, 0);
        crate::tap::use_own_program();
        return finish(match internal {
            Internal::BenchPeer(args) => bench::peer(&args),
            Internal::ChildInit(args) => child::init(&args),
            Internal::GuestInit(args) => exec::init(&args),
            Internal::IntoInit(args) => into::init(&args),
            Internal::JoinInit(args) => exec::init_joined(&args),
            Internal::NetnsHelper => netns_helper(),
        });
    }
    complete::answer();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return print_clap(&error),
    };
    logger::init(cli.verbose, cli.quiet);
    crate::tap::use_own_program();
    harden(&cli.command);
    let result = match cli.command {
        Command::Up(args) => up::up(&args),
        Command::Run(args) => run::run(&args),
        Command::Qemu(args) => qemu::qemu(&args),
        Command::Exec(args) => exec::exec(&args),
        Command::Join(args) => join::join(&args),
        Command::List(args) => list::list(&args),
        Command::Wait(args) => wait::wait(&args),
        Command::Status(args) => status::status(&args),
        Command::Ip(args) => guests::ip(&args),
        Command::Forward(args) => forward::forward(&args),
        Command::Policy(args) => policy::policy(&args),
        Command::Down(args) => up::down(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Check(args) => check::check(&args),
        Command::Man(args) => docs::man(&args),
        Command::Completions(args) => docs::completions(&args),
    };
    finish(result)
}

/// The exit status of what a command came to, and its error on stderr.
fn finish(result: Result<ExitCode, Failure>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(Failure::Reported) => ExitCode::FAILURE,
        Err(Failure::Usage(message)) => {
            eprintln!("lanlet: error: {message}\n\nFor more information, try '--help'.");
            ExitCode::from(EXIT_USAGE)
        }
        Err(Failure::Runtime(error)) => match is_broken_pipe(&*error) {
            true => ExitCode::SUCCESS,
            false => {
                eprintln!("lanlet: error: {}", chain(&*error));
                ExitCode::FAILURE
            }
        },
    }
}

/// Gives up what the command does not need. Who starts commands of the user's gives up new privileges once
/// they run ([`child::supervise`]); `bench` and `demo` only start others, and `check` tries what these do.
fn harden(command: &Command) {
    if matches!(
        command,
        Command::Demo(_) | Command::Bench(_) | Command::Check(_)
    ) {
        return;
    }
    child::give_up_core_files();
    if let Err(error) = harden::not_dumpable() {
        log::debug!("this process can be traced: {error}");
    }
    let starts_command = matches!(
        command,
        Command::Exec(_) | Command::Run(_) | Command::Qemu(_) | Command::Join(_)
    );
    if !starts_command {
        child::give_up_new_privileges();
    }
}

/// The helper shares lanlet's terminal, but lives exactly as long as lanlet: Ctrl-C must not end it
/// before.
fn netns_helper() -> Result<ExitCode, Failure> {
    child::hold_signals()?;
    child::give_up_core_files();
    child::give_up_new_privileges();
    crate::tap::helper::run_on_stdin()?;
    Ok(ExitCode::SUCCESS)
}

fn print_clap(error: &clap::Error) -> ExitCode {
    if error.use_stderr() {
        eprint!("lanlet: {}", error.render());
        return ExitCode::from(EXIT_USAGE);
    }
    // Help and version; a closed pipe is the reader's choice.
    let _ = error.print();
    ExitCode::SUCCESS
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// An error and its causes on one line. A cause that is part of its effect's words is not repeated.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}

/// Writes to stdout at once.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Replaces every occurrence of `from` in an argument, whatever its encoding.
fn replace_in(argument: &OsString, from: &str, to: &str) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let (mut rest, from) = (argument.as_bytes(), from.as_bytes());
    let mut result = Vec::with_capacity(rest.len());
    while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
        result.extend_from_slice(&rest[..at]);
        result.extend_from_slice(to.as_bytes());
        rest = &rest[at + from.len()..];
    }
    result.extend_from_slice(rest);
    OsString::from_vec(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_flag_has_help_and_every_public_command_examples() {
        let mut root = Cli::command();
        root.build();
        let own = |command: &&clap::Command| command.get_name() != "help";
        for command in root.get_subcommands().filter(own) {
            let name = command.get_name();
            assert!(command.get_about().is_some(), "{name} has no help");
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some() || argument.is_hide_set(),
                    "{name}: {} has no help",
                    argument.get_id()
                );
            }
            if !command.is_hide_set() {
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(help.contains("lanlet "), "{name} has no example");
            }
        }
    }

    #[test]
    fn placeholders() {
        let fill = |text: &str| replace_in(&OsString::from(text), "{fd}", "7");
        assert_eq!(fill("tap,fd={fd},x={fd}"), "tap,fd=7,x=7");
        assert_eq!(fill("{fd"), "{fd");
        assert_eq!(fill(""), "");
    }

    #[test]
    fn causes_are_printed_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open")]
        struct Outer(#[source] io::Error);
        let error = Outer(io::Error::from_raw_os_error(2));
        assert_eq!(
            chain(&error),
            "cannot open: No such file or directory (os error 2)"
        );
    }
}
