//! A lanlet network of the bench's: `lanlet up` below the world's root, and guests on it.

use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::agent::{Agent, POLL, Process};
use super::world::{RESOLVER, World};
use crate::control::RuntimeDir;
use crate::control::client::Client;

/// The network's name, in a directory of its own per way.
const NETWORK: &str = "bench";
/// How long `lanlet up` may take.
const NETWORK_TIME_MAX: Duration = Duration::from_secs(5);

/// A network that runs, and ends with this value.
pub(super) struct Network {
    name: String,
    program: PathBuf,
    dir: PathBuf,
    process: Process,
}

impl Network {
    /// Starts `program` and waits for its control socket. `name`: of logs and of a directory, unlike
    /// all others of the world. `options`: more of `lanlet up`.
    ///
    /// # Errors
    /// It did not start, in its own words.
    pub(super) fn up(
        world: &World,
        name: &str,
        program: &Path,
        options: &[&str],
    ) -> Result<Self, String> {
        let dir = world.private_dir(name)?;
        let mut up = command(world, program, &dir);
        up.args(["up", "--name", NETWORK, "--dns", RESOLVER])
            .args(["--lease-file", "none"])
            .args(options);
        let mut process = Process::spawn_mute(up, world.log(name))?;
        let begun = Instant::now();
        let socket = dir.join(format!("{NETWORK}.sock"));
        while UnixStream::connect(&socket).is_err() {
            process.check()?;
            if begun.elapsed() > NETWORK_TIME_MAX {
                return Err(format!("the network is not up{}", process.last_words()));
            }
            std::thread::sleep(POLL);
        }
        Ok(Self {
            name: name.to_owned(),
            program: program.to_owned(),
            dir,
            process,
        })
    }

    /// A namespace guest with load generators. `options`: more of `lanlet exec`.
    pub(super) fn guest(
        &self,
        world: &World,
        number: u32,
        options: &[&str],
    ) -> Result<Agent, String> {
        let mut exec = self.command(world, "exec");
        exec.args(options).arg("--").args(world.agent_words());
        Agent::spawn(exec, world.log(&format!("{}-{number}", self.name)))
    }

    /// A command that attaches something to it: `run`, `qemu` or `exec`.
    pub(super) fn command(&self, world: &World, word: &str) -> Command {
        let mut command = command(world, &self.program, &self.dir);
        command.args([word, "--name", NETWORK]);
        command
    }

    /// A connection to its control socket.
    pub(super) fn client(&self) -> Result<Client, String> {
        let client = Client::connect(&RuntimeDir::at(&self.dir), NETWORK);
        let client = client.map_err(|error| error.to_string())?;
        client.ok_or_else(|| format!("the network is gone{}", self.process.last_words()))
    }

    /// `lanlet up` itself. Its helper, where it has one, is its child.
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// An error if it has ended.
    pub(super) fn check(&mut self) -> Result<(), String> {
        self.process.check()
    }
}

fn command(world: &World, program: &Path, dir: &Path) -> Command {
    let mut command = world.at(&["--user"]);
    // Early versions of --base look for their helper by the file's name.
    command
        .arg(program)
        .env("LANLET_RUNTIME_DIR", dir)
        .env("LANLET_HELPER", program);
    command
}

/// A guest and the address that it has towards `to`, when it has one.
pub(super) fn with_address(mut guest: Agent, to: IpAddr) -> Result<(Agent, IpAddr), String> {
    let address = guest.wait_for_route(to)?;
    Ok((guest, address))
}
