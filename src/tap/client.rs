//! lanlet's side of the namespace helper.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Access, access};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use serde::{Deserialize, Serialize};

use super::protocol::{self, Event, Reply, Request};
use super::{TapError, WireKind};
use crate::config::MTU_MAX;
use crate::port::{DropSource, KernelDrops};

/// The hidden subcommand that runs [`super::helper::run_on_stdin`].
pub const HELPER_SUBCOMMAND: &str = "netns-helper";
/// Environment variable that names the program with that subcommand.
const HELPER_ENV: &str = "LANLET_HELPER";
/// Name of the program.
const PROGRAM: &str = "lanlet";
/// An answer takes milliseconds, on a loaded machine (RCU grace periods of taps going down) a
/// second. Past this the helper hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// What a wire should be like.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct WireOptions {
    /// MTU of the taps, 68..=65,521. It limits nothing that passes the wire; it is what a VMM sees
    /// that asks its tap.
    pub mtu: u32,
    /// Queues of the VMM's tap: 1..=[`super::QUEUES_MAX`], cut to that.
    pub queues: u16,
    /// The VMM's tap is a plain one: no virtio-net header, one queue. The switch's end keeps its
    /// offloads; the kernel segments and sums for the VMM.
    pub plain: bool,
    /// `None`: the best that the kernel can.
    pub kind: Option<WireKind>,
    /// A netlink socket of the namespace comes along, for who keeps the wire beyond the helper's end.
    pub netlink: bool,
}

impl Default for WireOptions {
    fn default() -> Self {
        Self {
            mtu: MTU_MAX.into(),
            queues: 1,
            plain: false,
            kind: None,
            netlink: false,
        }
    }
}

/// A VMM's tap joined to the switch.
#[derive(Debug)]
pub struct Wire {
    /// Number by which the helper knows it; never reused.
    pub id: u64,
    /// What joins the two ends.
    pub kind: WireKind,
    /// The VMM's fd, one for each queue.
    pub vm: Vec<OwnedFd>,
    /// The switch's end: one for each queue for [`crate::port::tap::open`], or a single one for
    /// [`crate::port::packet::open`], by `kind`.
    pub sw: Vec<OwnedFd>,
    /// A netlink socket of the helper's namespace, where one was asked for.
    pub netlink: Option<OwnedFd>,
    /// Name of the VMM's tap in the helper's namespace.
    pub vm_ifname: String,
    /// Name of the switch's tap there.
    pub sw_ifname: String,
    /// The kernel knows UDP segmentation.
    pub uso: bool,
}

/// The helper process, which lives as long as this value.
#[derive(Debug)]
pub struct Helper {
    /// One request at a time.
    control: Mutex<OwnedFd>,
    /// Requests and answers are out of step for good.
    ended: AtomicBool,
    child: Mutex<Child>,
}

/// The helper's notices.
#[derive(Debug)]
pub struct HelperEvents {
    socket: OwnedFd,
}

impl Helper {
    /// Starts the helper from `program`, a `lanlet`. `None`: the one named by LANLET_HELPER, else
    /// this very program if it is [`super::helper::run_if_asked`]'s, else the `lanlet` on PATH.
    ///
    /// # Errors
    /// The program is missing, or the host forbids the namespace: the error says what to do.
    pub fn spawn(program: Option<&Path>) -> Result<(Self, HelperEvents), TapError> {
        let program = program.map_or_else(default_program, Path::to_path_buf);
        let failed = |error: io::Error| TapError::HelperProgram {
            program: program.display().to_string(),
            cause: error.to_string(),
        };
        let (control, child_control) = pair().map_err(failed)?;
        let (events, child_events) = pair().map_err(failed)?;
        rustix::io::ioctl_fionbio(&events, true).map_err(|error| failed(error.into()))?;
        let child = Command::new(&program)
            .arg(HELPER_SUBCOMMAND)
            .stdin(child_control)
            .stdout(Stdio::null())
            // A Ctrl-C is for lanlet, which still needs the helper on its way out.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let helper = Self {
            control: Mutex::new(control),
            ended: AtomicBool::new(false),
            child: Mutex::new(child),
        };
        match helper.request(&Request::Start, &[child_events.as_fd()]) {
            Ok((Reply::Done, _)) => Ok((helper, HelperEvents { socket: events })),
            Ok((reply, _)) => Err(helper.unexpected(&reply)),
            Err(TapError::HelperGone { .. }) => {
                let cause = io::Error::other("it is not the lanlet program, or it failed at once");
                Err(failed(cause))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a wire.
    ///
    /// # Errors
    /// What the kernel lacks or forbids.
    pub fn create_wire(&self, options: WireOptions) -> Result<Wire, TapError> {
        match self.request(&Request::Create(options), &[])? {
            (
                Reply::Wire {
                    id,
                    kind,
                    vm_ifname,
                    sw_ifname,
                    vm_queues,
                    uso,
                    fallback,
                },
                mut vm,
            ) => {
                if let Some(why) = fallback {
                    log::warn!("{vm_ifname}: a packet socket takes the place of a tap pair: {why}");
                }
                let mut sw = vm.split_off(vm_queues.min(vm.len()));
                let netlink = options.netlink.then(|| sw.pop()).flatten();
                if sw.is_empty() {
                    return Err(TapError::not_a_tap("no fd came with the wire"));
                }
                Ok(Wire {
                    id,
                    kind,
                    vm,
                    sw,
                    netlink,
                    vm_ifname,
                    sw_ifname,
                    uso,
                })
            }
            (reply, _) => Err(self.unexpected(&reply)),
        }
    }

    /// Takes wire `id` down; its fds are the caller's to close. Unknown ids are ignored.
    ///
    /// # Errors
    /// The helper is gone.
    pub fn destroy_wire(&self, id: u64) -> Result<(), TapError> {
        self.request(&Request::Destroy(id), &[]).map(drop)
    }

    /// The kernel's drops on wire `id`. Those of a packet socket's ring are
    /// [`crate::port::packet::PacketDrops`]'s to tell.
    ///
    /// # Errors
    /// The wire or the helper is gone.
    pub fn drops(&self, id: u64) -> Result<KernelDrops, TapError> {
        match self.request(&Request::Drops(id), &[])? {
            (Reply::Drops(drops), _) => Ok(drops),
            (reply, _) => Err(self.unexpected(&reply)),
        }
    }

    /// Whether it will answer no more.
    pub fn is_ended(&self) -> bool {
        self.ended.load(Relaxed)
    }

    /// Ends the helper: its wires go down, its events end, every request fails.
    pub fn end(&self) {
        self.ended.store(true, Relaxed);
        // It has ended already if this fails.
        let _ = self
            .child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .kill();
    }

    /// Process id of the helper, for status and tests.
    pub fn pid(&self) -> u32 {
        self.child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .id()
    }

    fn request(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), TapError> {
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_ended() {
            return Err(gone("it was given up"));
        }
        let answer = protocol::send(control.as_fd(), request, fds)
            .and_then(|()| protocol::recv(control.as_fd()));
        match answer {
            Ok(Some((Reply::Failed(error), _))) => Err(error),
            Ok(Some(answer)) => Ok(answer),
            // One message went by, and the next one will fit its request.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(TapError::HelperAnswer {
                    cause: error.to_string(),
                })
            }
            // An answer that comes late would be taken for the next request's.
            Err(error) => {
                self.end();
                Err(match error.kind() {
                    io::ErrorKind::WouldBlock => gone("it did not answer and was killed"),
                    _ => gone(error),
                })
            }
            Ok(None) => {
                self.end();
                Err(gone("it closed its socket"))
            }
        }
    }

    /// For an answer of another request: nothing that follows can be trusted.
    fn unexpected(&self, reply: &Reply) -> TapError {
        self.end();
        gone(format!("it answered {reply:?}"))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // A killed helper leaves nothing that the kernel does not clean up.
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl HelperEvents {
    /// The next notice, without waiting; `None` when there is none now.
    ///
    /// # Errors
    /// The helper is gone.
    pub fn next_event(&self) -> Result<Option<Event>, TapError> {
        match protocol::recv(self.socket.as_fd()) {
            Ok(Some((event, _))) => Ok(Some(event)),
            Ok(None) => Err(gone("it closed its socket")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(gone(error)),
        }
    }
}

impl AsFd for HelperEvents {
    /// Readable when [`HelperEvents::next_event`] has something to tell.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Drops of one wire.
pub struct WireDrops {
    helper: std::sync::Arc<Helper>,
    id: u64,
}

impl WireDrops {
    /// For wire `id`.
    pub fn new(helper: std::sync::Arc<Helper>, id: u64) -> Self {
        Self { helper, id }
    }
}

impl DropSource for WireDrops {
    fn kernel_drops(&self) -> io::Result<KernelDrops> {
        self.helper.drops(self.id).map_err(io::Error::other)
    }
}

fn gone(cause: impl std::fmt::Display) -> TapError {
    TapError::HelperGone {
        cause: cause.to_string(),
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    set_socket_timeout(&ours, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
    Ok((ours, theirs))
}

/// Whether this very program has the subcommand.
static IS_HELPER: AtomicBool = AtomicBool::new(false);

/// From here on this process's own program is its helper, whatever it is called.
pub(crate) fn use_own_program() {
    IS_HELPER.store(true, Relaxed);
}

/// The program to run as helper.
fn default_program() -> PathBuf {
    choose_program(
        env::var_os(HELPER_ENV),
        IS_HELPER.load(Relaxed),
        env::var_os("PATH"),
    )
}

fn choose_program(named: Option<OsString>, is_helper: bool, path: Option<OsString>) -> PathBuf {
    if let Some(program) = named.filter(|program| !program.is_empty()) {
        return program.into();
    }
    if is_helper {
        // Not its path: an upgrade may have replaced the file meanwhile.
        return "/proc/self/exe".into();
    }
    // Looked for here, as execvp(3) reports a directory of PATH that can't be read before a file that is
    // nowhere.
    let directories = path.unwrap_or_default();
    env::split_paths(&directories)
        .map(|directory| directory.join(PROGRAM))
        .find(|program| access(program, Access::EXEC_OK).is_ok())
        .unwrap_or_else(|| PROGRAM.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// A helper that does nothing by itself, and its end of the socket.
    fn mute(timeout: Duration) -> (Helper, OwnedFd) {
        let (control, theirs) = pair().unwrap();
        set_socket_timeout(&control, Timeout::Recv, Some(timeout)).unwrap();
        let helper = Helper {
            control: Mutex::new(control),
            ended: AtomicBool::new(false),
            child: Mutex::new(Command::new("sleep").arg("60").spawn().unwrap()),
        };
        (helper, theirs)
    }

    #[test]
    fn an_answer_that_comes_late_is_nobody_s() {
        let (helper, theirs) = mute(Duration::from_millis(20));
        let error = helper.drops(0).unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
        let late = KernelDrops { rx: 1, tx: 2 };
        protocol::send(theirs.as_fd(), &Reply::Drops(late), &[]).unwrap();
        assert!(matches!(helper.drops(1), Err(TapError::HelperGone { .. })));
        assert!(helper.is_ended());
        let deadline = Instant::now() + Duration::from_secs(5);
        while helper.child.lock().unwrap().try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the child lives on");
        }
    }

    #[test]
    fn an_answer_out_of_step_ends_it_and_a_refusal_does_not() {
        let (helper, theirs) = mute(ANSWER_TIMEOUT);
        let failed = Reply::Failed(TapError::TunMissing);
        protocol::send(theirs.as_fd(), &failed, &[]).unwrap();
        assert!(matches!(helper.drops(0), Err(TapError::TunMissing)));
        crate::sys::fd_pass::send(theirs.as_fd(), b"nonsense", &[]).unwrap();
        assert!(matches!(
            helper.drops(0),
            Err(TapError::HelperAnswer { .. })
        ));
        assert!(!helper.is_ended());
        protocol::send(theirs.as_fd(), &Reply::Done, &[]).unwrap();
        assert!(matches!(helper.drops(0), Err(TapError::HelperGone { .. })));
        assert!(helper.is_ended());
    }

    #[test]
    fn a_program_is_its_own_helper_and_a_library_looks_on_path() {
        let directory = env::temp_dir().join(format!("lanlet-path-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("dir")).unwrap();
        let program = directory.join("dir").join(PROGRAM);
        std::fs::copy("/bin/true", &program).unwrap();
        // The entry before it is a file: nothing below can be looked at.
        let path = format!("/bin/true:{}", directory.join("dir").display());
        let path = Some(OsString::from(path));
        let choose = |named: Option<&str>, is_helper| {
            choose_program(named.map(Into::into), is_helper, path.clone())
        };
        assert_eq!(choose(None, false), program);
        assert_eq!(choose(Some(""), true), Path::new("/proc/self/exe"));
        assert_eq!(choose(Some("/opt/lanlet"), true), Path::new("/opt/lanlet"));
        assert_eq!(choose_program(None, false, None), Path::new(PROGRAM));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
