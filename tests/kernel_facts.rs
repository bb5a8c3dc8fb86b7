//! What lanlet relies on of the kernel, each fact by itself: when a port misbehaves on some machine,
//! this says which assumption is wrong there.

mod kernel;

use std::os::fd::{AsFd, OwnedFd};

use kernel::*;
use lanlet::sys::tun;
use lanlet::tap::{Helper, TX_QUEUE_LEN, Wire, WireKind, WireOptions};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

fn mirred_wire() -> (Helper, Wire, OwnedFd) {
    let (helper, _) = spawn_helper();
    let options = WireOptions {
        kind: Some(WireKind::Mirred),
        ..WireOptions::default()
    };
    let mut wire = helper.create_wire(options).unwrap();
    let vm = wire.vm.pop().unwrap();
    (helper, wire, vm)
}

/// Why a VMM needs a real tap: TUNGETIFF, which every VMM asks first, refuses anything else.
#[test]
fn tungetiff_refuses_sockets() {
    let types = [SocketType::STREAM, SocketType::DGRAM, SocketType::SEQPACKET];
    for kind in types {
        let flags = SocketFlags::CLOEXEC;
        let (a, _b) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let error = tun::info(a.as_fd()).unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::NOTTY));
    }
}

/// Why two taps are needed: a copy of a tap's fd does not see what its owner writes.
#[test]
fn a_copy_of_a_tap_fd_sees_nothing_of_what_is_written() {
    let (_helper, wire, vm) = mirred_wire();
    let copy = vm.try_clone().unwrap();
    write_vnet(&vm, &[0; 12], &plain_frame(100));
    assert!(read_vnet(&copy).is_none());
    assert!(read_vnet(&wire.sw[0]).is_some());
}

/// A wire is silent: no ARP, no router solicitation, nothing that the kernel says by itself.
#[test]
fn a_wire_is_silent() {
    let (_helper, wire, vm) = mirred_wire();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(read_vnet(&vm).is_none());
    assert!(read_vnet(&wire.sw[0]).is_none());
}

/// A write that finds the other tap's queue full succeeds all the same: only the counter knows.
#[test]
fn a_full_queue_drops_silently_and_counts() {
    let (helper, wire, vm) = mirred_wire();
    let extra = 7;
    for _ in 0..u64::from(TX_QUEUE_LEN) + extra {
        write_vnet(&vm, &[0; 12], &plain_frame(60));
    }
    assert_eq!(helper.drops(wire.id).unwrap().rx, extra);
}

/// The kernel completes checksums for a reader that did not ask for them undone, and leaves them to
/// one that did.
#[test]
fn offloads_follow_the_reader() {
    let (_helper, wire, vm) = mirred_wire();
    let (frame, start) = tcp_frame(1000, None);
    let mut header = tso_header(start);
    header[1] = 0;
    header[4..6].fill(0);
    write_vnet(&wire.sw[0], &header, &frame);
    let (left, complete) = read_vnet(&vm).unwrap();
    assert_eq!(left[0] & 1, 0);
    assert!(tcp_checksum_is_right(&complete));
    tun::set_offload(vm.as_fd(), tun::OFFLOAD_TSO).unwrap();
    write_vnet(&wire.sw[0], &header, &frame);
    let (left, same) = read_vnet(&vm).unwrap();
    assert_eq!((left[0] & 1, same), (1, frame));
}

/// A super-frame whose IP packet has the full 65,535 bytes is too long for a tap's gso_max_size
/// (65,536 with the Ethernet header): the kernel segments it, nothing is lost.
#[test]
fn a_super_frame_above_gso_max_size_is_segmented() {
    let (helper, wire, vm) = mirred_wire();
    tun::set_offload(vm.as_fd(), tun::OFFLOAD_TSO).unwrap();
    let longest_whole = 65_535 - 54;
    for (payload, whole) in [(longest_whole, true), (65_535 - 40, false)] {
        let (frame, start) = tcp_frame(payload, None);
        write_vnet(&wire.sw[0], &tso_header(start), &frame);
        let mut frames = 0;
        let mut bytes = 0;
        while let Some((_, part)) = read_vnet(&vm) {
            frames += 1;
            bytes += part.len() - 54;
        }
        assert_eq!(bytes, payload);
        assert_eq!(frames == 1, whole, "{payload} bytes in {frames} frames");
    }
    assert_eq!(helper.drops(wire.id).unwrap(), Default::default());
}

/// A header that contradicts the frame is refused with EINVAL, at the writer.
#[test]
fn a_lying_header_is_refused() {
    let (_helper, wire, vm) = mirred_wire();
    let (frame, _) = tcp_frame(1000, None);
    let header = tso_header(frame.len() as u16 + 100);
    let parts = [
        std::io::IoSlice::new(&header),
        std::io::IoSlice::new(&frame),
    ];
    assert_eq!(rustix::io::writev(&vm, &parts), Err(Errno::INVAL));
    assert!(read_vnet(&wire.sw[0]).is_none());
}

/// The tun driver knows what an offload tap needs.
#[test]
fn the_driver_has_the_features() {
    let features = tun::features(tun::open().unwrap().as_fd()).unwrap();
    // IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE
    let needed = 0x0002 | 0x1000 | 0x4000 | 0x0100;
    assert_eq!(features & needed, needed);
}

/// The user's and network namespaces of the helper are not the caller's.
#[test]
fn the_helper_is_in_namespaces_of_its_own() {
    let (helper, _events) = spawn_helper();
    for namespace in ["user", "net"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        let ours = of("self").unwrap();
        // An ordinary user may not look into a process of another user namespace's root; then it
        // is another one.
        if let Ok(theirs) = of(&helper.pid().to_string()) {
            assert_ne!(ours, theirs);
        }
    }
}
