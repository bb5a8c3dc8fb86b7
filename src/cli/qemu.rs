//! `lanlet qemu`: QEMU with a network card on the LAN.

mod identity;
mod memory;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::forward::ForwardFlags;
use super::lan::{Lan, LanFlags};
use super::options::{NetworkOptions, PortFlags, VmmFlags};
use super::run::{By, Link, with_link};
use super::{Failure, child};

/// Of a vhost-user card: the longest queues that QEMU allows. Its default of 256 holds six super-frames.
const VHOST_USER_CARD: &str = ",rx_queue_size=1024,tx_queue_size=1024";

/// The same where QEMU emulates the CPU: no MSI-X. QEMU 7.2 takes the interrupts of a vhost-user card that
/// has it to KVM (hw/virtio/virtio-pci.c, `kvm_virtio_pci_irqfd_use`) and crashes where there is none.
const VHOST_USER_CARD_WITHOUT_KVM: &str = ",rx_queue_size=1024,tx_queue_size=1024,vectors=0";

/// Run QEMU with a virtio network card on the network
///
/// Finds qemu-system for this machine and adds -netdev tap and a virtio-net device with a MAC
/// address of its own, which follows from --guest-name or else from the first disk. Where QEMU-ARGS have a -device with netdev=lanlet0, that is the card and none
/// is added. A network that ends and is started again gets its port back. With -daemonize it does not, and the
/// VM needs a network that runs already, and no -p.
///
/// With --vhost-user the netdev is a vhost-user one, and the guest's memory, of the size that QEMU-ARGS
/// say by -m, is made one that can be shared; where they name a memory backend it has to have share=on.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet qemu -- -m 1G -drive file=disk.qcow2
  lanlet qemu -p 127.0.0.1:2222:22 -- -m 1G disk.img
  lanlet qemu --vhost-user -- -enable-kvm -m 2G disk.img
  lanlet qemu --name lab --mac 52:54:00:00:00:07 -- -enable-kvm -m 2G disk.img
  lanlet qemu -- -device virtio-net-pci,netdev=lanlet0,mq=on -m 1G disk.img
  lanlet qemu --qemu qemu-system-aarch64 -- -M virt -cpu cortex-a72 -m 1G disk.img")]
pub(super) struct Args {
    #[command(flatten)]
    lan: LanFlags,
    /// The QEMU to run, by name or path [default: qemu-system of this machine]
    #[arg(long, value_name = "BINARY")]
    qemu: Option<PathBuf>,
    #[command(flatten)]
    port: PortFlags,
    #[command(flatten)]
    vmm: VmmFlags,
    #[command(flatten)]
    forwards: ForwardFlags,
    /// Arguments for QEMU
    #[arg(last = true, value_name = "QEMU-ARGS")]
    arguments: Vec<OsString>,
    #[command(flatten)]
    network: NetworkOptions,
}

pub(super) fn qemu(args: &Args) -> Result<ExitCode, Failure> {
    let signals = child::block_signals()?;
    let program = match &args.qemu {
        Some(program) => program.clone(),
        None => find()?,
    };
    let lan = Lan::open("qemu", &args.lan, &args.network)?;
    if daemonizes(&args.arguments) {
        check_daemonize(args, &lan)?;
    }
    let own_mac = identity::mac(args.port.name(), &args.arguments);
    let flags = (&args.port, own_mac, &args.vmm, &args.forwards);
    with_link(lan, &signals, flags, |link| {
        command(&program, &args.arguments, link)
    })
}

/// Whether QEMU is to put itself into the background.
fn daemonizes(arguments: &[OsString]) -> bool {
    arguments
        .iter()
        .any(|argument| argument == "-daemonize" || argument == "--daemonize")
}

/// Refuses a QEMU in the background that would lose its network when this process ends.
fn check_daemonize(args: &Args, lan: &Lan) -> Result<(), Failure> {
    let refused = |what: &str, remedy: String| {
        Err(Failure::Usage(format!(
            "-daemonize: {what} would end with this command, and the VM lives on: {remedy}"
        )))
    };
    if matches!(lan, Lan::Embedded { .. }) {
        let remedy = "start a network that stays with 'lanlet up -d' first, or run QEMU in the \
                      foreground, 'lanlet qemu … &'";
        return refused("the network", remedy.to_owned());
    }
    if args.vmm.by_vhost_user() {
        let remedy =
            "leave out --vhost-user, or have 'lanlet up --port vhost-user:PATH' serve the socket";
        return refused("the vhost-user socket", remedy.to_owned());
    }
    if args.forwards.specs().next().is_some() {
        let remedy = format!("add them with 'lanlet forward add{}'", args.lan.words());
        return refused("the forwards", remedy);
    }
    Ok(())
}

/// QEMU's command line with the card added.
///
/// # Errors
/// The arguments leave no way to share the guest's memory.
pub(super) fn command(
    program: &Path,
    arguments: &[OsString],
    link: &Link,
) -> Result<Vec<OsString>, Failure> {
    let (id, card_is_given) = netdev_id(arguments);
    let mut command = vec![program.as_os_str().to_owned()];
    command.extend_from_slice(arguments);
    let mut add = |option: &str, value: String| command.extend([option.into(), value.into()]);
    let mut card_options = String::new();
    match &link.by {
        By::Tap { queues: 1, fd, .. } => add("-netdev", format!("tap,id={id},fd={fd}")),
        By::Tap { queues, fds, .. } => {
            add("-netdev", format!("tap,id={id},fds={fds}"));
            card_options.push_str(&several_queues(*queues, program, arguments));
        }
        By::VhostUser { socket, queues } => {
            if let Some(bytes) = memory::to_share(arguments)? {
                let memory = format!("memory-backend-memfd,id={id}-memory,size={bytes},share=on");
                add("-object", memory);
                add("-machine", format!("memory-backend={id}-memory"));
            }
            // A comma in a value is written twice.
            let path = socket.replace(',', ",,");
            add(
                "-chardev",
                format!("socket,id={id}-socket,path={path},reconnect=1"),
            );
            let netdev = format!("vhost-user,id={id},chardev={id}-socket");
            let has_kvm = has_kvm(arguments);
            if *queues == 1 {
                add("-netdev", netdev);
            } else {
                add("-netdev", format!("{netdev},queues={queues}"));
                card_options.push_str(&match has_kvm {
                    true => several_queues((*queues).into(), program, arguments),
                    false => ",mq=on".to_owned(),
                });
            }
            card_options.push_str(match has_kvm {
                true => VHOST_USER_CARD,
                false => VHOST_USER_CARD_WITHOUT_KVM,
            });
        }
    }
    if !card_is_given {
        let card = card(program, arguments);
        add(
            "-device",
            format!("{card},netdev={id},mac={}{card_options}", link.mac),
        );
    }
    Ok(command)
}

/// Options of a card with several queues.
fn several_queues(queues: usize, program: &Path, arguments: &[OsString]) -> String {
    if card(program, arguments) == PCI_CARD {
        // An interrupt for each direction of each queue, for control and for configuration.
        let vectors = 2 * queues + 2;
        format!(",mq=on,vectors={vectors}")
    } else {
        ",mq=on".to_owned()
    }
}

/// Whether the arguments ask for KVM.
fn has_kvm(arguments: &[OsString]) -> bool {
    let by_option = arguments
        .iter()
        .any(|argument| argument == "-enable-kvm" || argument == "--enable-kvm");
    let by_accelerator = arguments.windows(2).any(|pair| {
        let option = pair[0].as_bytes();
        let value = &pair[1];
        (option.ends_with(b"-accel") && (has_item(value, "kvm") || has_item(value, "accel=kvm")))
            || (matches!(option, b"-M" | b"-machine" | b"--machine")
                && has_item(value, "accel=kvm"))
    });
    by_option || by_accelerator
}

/// Whether an option list like `user,id=x` has this item.
fn has_item(argument: &OsStr, item: &str) -> bool {
    argument
        .as_bytes()
        .split(|&byte| byte == b',')
        .any(|part| part == item.as_bytes())
}

/// An id for the netdev that the arguments leave free, and whether they have a card for it: one that
/// names `netdev=lanlet0` without such a netdev being defined waits for ours.
fn netdev_id(arguments: &[OsString]) -> (String, bool) {
    let taken = |id: &str| {
        arguments
            .iter()
            .any(|argument| has_item(argument, &format!("id={id}")))
    };
    for number in 0.. {
        let id = format!("lanlet{number}");
        if !taken(&id) {
            let wanted = format!("netdev={id}");
            return (
                id,
                arguments.iter().any(|argument| has_item(argument, &wanted)),
            );
        }
    }
    unreachable!("a finite command line takes finitely many ids")
}

const PCI_CARD: &str = "virtio-net-pci";

/// The virtio card of the machine: by PCI where there is PCI.
fn card(program: &Path, arguments: &[OsString]) -> &'static str {
    let machine_is = |name: &str| {
        arguments.windows(2).any(|pair| {
            let option = pair[0].as_bytes();
            matches!(option, b"-M" | b"-machine" | b"--machine")
                && (has_item(&pair[1], name) || has_item(&pair[1], &format!("type={name}")))
        })
    };
    let is_s390 = program.to_string_lossy().ends_with("s390x");
    match () {
        () if machine_is("microvm") => "virtio-net-device",
        () if is_s390 => "virtio-net-ccw",
        () => PCI_CARD,
    }
}

/// QEMU's name for this machine.
fn native() -> &'static str {
    match std::env::consts::ARCH {
        "x86" => "i386",
        "powerpc64" => "ppc64",
        "loongarch64" => "loongarch64",
        arch => arch,
    }
}

/// Debian's package with this machine's QEMU.
fn package() -> &'static str {
    match native() {
        "x86_64" | "i386" => "qemu-system-x86",
        "aarch64" | "arm" => "qemu-system-arm",
        "ppc64" => "qemu-system-ppc",
        _ => "qemu-system-misc",
    }
}

/// The QEMU of this machine in PATH, else any system emulator.
///
/// # Errors
/// There is none.
pub(super) fn find() -> Result<PathBuf, Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    find_in(&path).ok_or_else(|| {
        Failure::because(format!(
            "no qemu-system-{} in PATH: install Debian's package {}, or name a binary with --qemu",
            native(),
            package()
        ))
    })
}

fn find_in(path: &OsStr) -> Option<PathBuf> {
    let is_program = |file: &PathBuf| {
        file.metadata()
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let directories = || std::env::split_paths(path).filter(|dir| !dir.as_os_str().is_empty());
    let own = format!("qemu-system-{}", native());
    directories()
        .map(|dir| dir.join(&own))
        .find(is_program)
        .or_else(|| {
            directories()
                .filter_map(|dir| dir.read_dir().ok())
                .flat_map(|entries| {
                    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
                    files.sort();
                    files
                })
                .filter(|file| {
                    let name = file.file_name().unwrap_or_default().as_bytes();
                    name.starts_with(b"qemu-system-")
                })
                .find(is_program)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(program: &str, arguments: &[&str]) -> String {
        let by = By::Tap {
            fd: "7".into(),
            fds: "7".into(),
            queues: 1,
            ifname: "vm0".into(),
        };
        line_by(by, program, arguments).unwrap()
    }

    fn line_by(by: By, program: &str, arguments: &[&str]) -> Result<String, Failure> {
        let link = Link {
            mac: "52:54:00:00:00:01".into(),
            by,
        };
        let arguments: Vec<OsString> = arguments.iter().map(Into::into).collect();
        let words = command(Path::new(program), &arguments, &link)?;
        Ok(words.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[test]
    fn a_vhost_user_guests_memory_is_shared() {
        let by = || By::VhostUser {
            socket: "/run/a,b.sock".into(),
            queues: 1,
        };
        for kvm in [
            &["-enable-kvm"][..],
            &["-accel", "kvm"],
            &["-M", "q35,accel=kvm"],
        ] {
            assert!(
                line_by(by(), "q", kvm)
                    .unwrap()
                    .ends_with("tx_queue_size=1024")
            );
        }
        let words = line_by(by(), "q", &["-m", "1G"]).unwrap();
        assert_eq!(
            words,
            "q -m 1G -object memory-backend-memfd,id=lanlet0-memory,size=1073741824,share=on \
             -machine memory-backend=lanlet0-memory \
             -chardev socket,id=lanlet0-socket,path=/run/a,,b.sock,reconnect=1 \
             -netdev vhost-user,id=lanlet0,chardev=lanlet0-socket \
             -device virtio-net-pci,netdev=lanlet0,mac=52:54:00:00:00:01,rx_queue_size=1024,tx_queue_size=1024,vectors=0"
        );
        let shared = "memory-backend-file,id=m,size=1G,mem-path=/dev/shm,share=on";
        let words = line_by(
            by(),
            "q",
            &["-object", shared, "-M", "q35,memory-backend=m"],
        )
        .unwrap();
        assert!(!words.contains("memfd"), "{words}");
        let private = "memory-backend-ram,id=m,size=1G";
        let refused = line_by(by(), "q", &["-object", private, "-numa", "node,memdev=m"]);
        assert!(refused.is_err());
    }

    #[test]
    fn netdev_and_card_are_added() {
        assert_eq!(
            line("qemu-system-x86_64", &["-m", "1G"]),
            "qemu-system-x86_64 -m 1G -netdev tap,id=lanlet0,fd=7 \
             -device virtio-net-pci,netdev=lanlet0,mac=52:54:00:00:00:01"
        );
        assert!(line("q", &["-M", "microvm,rtc=on"]).contains("-device virtio-net-device,"));
        assert!(line("q", &["-machine", "type=microvm"]).contains("-device virtio-net-device,"));
        assert!(line("/usr/bin/qemu-system-s390x", &[]).contains("virtio-net-ccw"));
    }

    #[test]
    fn several_queues_are_several_descriptors() {
        let by = By::Tap {
            fd: "7".into(),
            fds: "7:8".into(),
            queues: 2,
            ifname: "vm0".into(),
        };
        assert_eq!(
            line_by(by, "q", &[]).unwrap(),
            "q -netdev tap,id=lanlet0,fds=7:8 \
             -device virtio-net-pci,netdev=lanlet0,mac=52:54:00:00:00:01,mq=on,vectors=6"
        );
    }

    #[test]
    fn a_vhost_user_card_has_as_many() {
        let by = || By::VhostUser {
            socket: "s".into(),
            queues: 4,
        };
        let words = line_by(by(), "q", &["-enable-kvm"]).unwrap();
        assert!(words.contains(",chardev=lanlet0-socket,queues=4 "));
        let rest = "mq=on,vectors=10,rx_queue_size=1024,tx_queue_size=1024";
        assert!(words.ends_with(rest), "{words}");
        let words = line_by(by(), "q", &[]).unwrap();
        let rest = "mq=on,rx_queue_size=1024,tx_queue_size=1024,vectors=0";
        assert!(words.ends_with(rest), "{words}");
    }

    #[test]
    fn the_users_netdevs_and_cards_are_left_alone() {
        let words = line(
            "q",
            &[
                "-netdev",
                "user,id=lanlet0",
                "-device",
                "e1000,netdev=lanlet0",
            ],
        );
        assert!(words.contains("tap,id=lanlet1,fd=7 -device virtio-net-pci,netdev=lanlet1,"));
        let words = line("q", &["-device", "e1000,netdev=lanlet0"]);
        assert!(words.ends_with("-device e1000,netdev=lanlet0 -netdev tap,id=lanlet0,fd=7"));
    }

    #[test]
    fn own_machine_first_then_any() {
        let dir = std::env::temp_dir().join(format!("lanlet-qemu-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let make = |name: &str, mode| {
            std::fs::write(dir.join(name), "").unwrap();
            std::fs::set_permissions(dir.join(name), PermissionsExt::from_mode(mode)).unwrap();
        };
        assert_eq!(find_in(dir.as_os_str()), None);
        make("qemu-system-aaa", 0o644);
        assert_eq!(find_in(dir.as_os_str()), None);
        make("qemu-system-zzz", 0o755);
        assert_eq!(find_in(dir.as_os_str()), Some(dir.join("qemu-system-zzz")));
        let own = format!("qemu-system-{}", native());
        make(&own, 0o755);
        assert_eq!(find_in(dir.as_os_str()), Some(dir.join(own)));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
