//! The whole way of a frame from one VMM's tap to another's, beside a plain relay between two such taps:
//! the same wires of the kernel, and a thread that reads and writes and knows nothing.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};

use super::reference::Reference;
use super::{Failure, Piece};
use crate::config::NetworkConfig;
use crate::frame::Mac;
use crate::network::{Network, PortOptions};
use crate::offload::VNET_HEADER_LEN;
use crate::sys::tun;
use crate::tap::{Helper, WireOptions};

/// Frames under way at a time: well below a tap's queue, so that none is lost.
const BURST: usize = 64;
/// Frames that are passed at a time: a worker sleeps between two of these.
const FRAMES: usize = 128;
const MSS: u16 = 1_448;
/// IEEE 802 local experimental EtherType 1, for frames that nothing looks into.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const MACS: [Mac; 2] = [Mac([0x52, 0x54, 0, 0, 0, 1]), Mac([0x52, 0x54, 0, 0, 0, 2])];

/// # Errors
/// The machine makes no taps.
pub(super) fn all() -> Result<Vec<Piece>, Failure> {
    let mut pieces = Vec::new();
    for (name, raw) in [("wire-64", small()), ("wire-64k", super_frame())] {
        let (mut ours, mut plain) = (lanlet()?, relay()?);
        let frame = raw.clone();
        pieces.push(Piece {
            name,
            work: Box::new(move |count| (0..count).for_each(|_| ours.pass(&frame))),
            reference: Reference {
                name: "relay",
                work: Box::new(move |count| (0..count).for_each(|_| plain.pass(&raw))),
            },
        });
    }
    Ok(pieces)
}

/// Two VMs that have nothing but a tap.
struct Guests {
    from: File,
    to: File,
    buffer: Vec<u8>,
    /// What is between them.
    _between: Box<dyn Send>,
}

impl Guests {
    fn new(from: OwnedFd, to: OwnedFd, between: Box<dyn Send>) -> std::io::Result<Self> {
        for tap in [&from, &to] {
            // What a Linux guest negotiates.
            tun::set_offload(tap.as_fd(), tun::OFFLOAD_TSO)?;
            rustix::io::ioctl_fionbio(tap, true)?;
        }
        let mut guests = Self {
            from: File::from(from),
            to: File::from(to),
            buffer: vec![0; 70_000],
            _between: between,
        };
        // The receiver is learned.
        let mut hello = small();
        let (destination, source) = hello[VNET_HEADER_LEN..].split_at_mut(6);
        destination.swap_with_slice(&mut source[..6]);
        guests.to.write_all(&hello)?;
        while guests.from.read(&mut guests.buffer).is_err() {
            thread::yield_now();
        }
        Ok(guests)
    }

    /// Passes [`FRAMES`]. Other frames are none of ours: those of the gateway are shorter or longer.
    fn pass(&mut self, raw: &[u8]) {
        let (mut sent, mut received) = (0, 0);
        while received < FRAMES {
            while sent < FRAMES && sent - received < BURST {
                self.from.write_all(raw).expect("the wire takes frames");
                sent += 1;
            }
            match self.to.read(&mut self.buffer) {
                Ok(len) => received += usize::from(len == raw.len()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::yield_now(),
                Err(error) => panic!("the tap is gone: {error}"),
            }
        }
    }
}

fn lanlet() -> Result<Guests, Failure> {
    let config = NetworkConfig {
        name: "guard".to_owned(),
        ..NetworkConfig::default()
    };
    let network = Network::start(config)?;
    let attach = |mac| {
        network.attach_vmm(PortOptions {
            mac: Some(mac),
            ..PortOptions::default()
        })
    };
    let (from, to) = (attach(MACS[0])?, attach(MACS[1])?);
    let (from, to) = (only(from.fds)?, only(to.fds)?);
    Ok(Guests::new(from, to, Box::new(network))?)
}

/// The fd of a tap with one queue.
fn only(fds: Vec<OwnedFd>) -> Result<OwnedFd, Failure> {
    fds.into_iter().next().ok_or(Failure::Reported)
}

fn relay() -> Result<Guests, Failure> {
    let (helper, events) = Helper::spawn(None)?;
    let wire = || {
        let wire = helper.create_wire(WireOptions::default())?;
        let (vm, sw) = (only(wire.vm)?, only(wire.sw)?);
        tun::set_vnet_header_len(sw.as_fd(), VNET_HEADER_LEN)?;
        tun::enable_offloads(sw.as_fd())?;
        rustix::io::ioctl_fionbio(&sw, true).map_err(std::io::Error::from)?;
        Ok::<_, Failure>((vm, sw))
    };
    let ((from, ours), (to, theirs)) = (wire()?, wire()?);
    // It ends with the process.
    thread::spawn(move || {
        let mut buffer = vec![0; 70_000];
        loop {
            let mut fds = [&ours, &theirs].map(|fd| PollFd::new(fd, PollFlags::IN));
            let _ = poll(&mut fds, None);
            for (from, to) in [(&ours, &theirs), (&theirs, &ours)] {
                while let Ok(len) = rustix::io::read(from, &mut buffer) {
                    let _ = rustix::io::write(to, &buffer[..len]);
                }
            }
        }
    });
    Ok(Guests::new(from, to, Box::new((helper, events)))?)
}

fn small() -> Vec<u8> {
    let mut raw = vec![0; VNET_HEADER_LEN + 64];
    let frame = &mut raw[VNET_HEADER_LEN..];
    frame[..6].copy_from_slice(&MACS[1].0);
    frame[6..12].copy_from_slice(&MACS[0].0);
    frame[12..14].copy_from_slice(&ETHERTYPE);
    raw
}

/// A TCP super-frame with its checksum left to do.
fn super_frame() -> Vec<u8> {
    let payload = 44 * usize::from(MSS);
    let mut raw = small();
    raw.resize(VNET_HEADER_LEN + 54 + payload, 0);
    let (header, frame) = raw.split_at_mut(VNET_HEADER_LEN);
    (header[0], header[1]) = (1, 1);
    header[2..4].copy_from_slice(&54_u16.to_le_bytes());
    header[4..6].copy_from_slice(&MSS.to_le_bytes());
    header[6..8].copy_from_slice(&34_u16.to_le_bytes());
    header[8..10].copy_from_slice(&16_u16.to_le_bytes());
    frame[12..15].copy_from_slice(&[0x08, 0, 0x45]);
    frame[16..18].copy_from_slice(&((40 + payload) as u16).to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 6]);
    frame[26..34].copy_from_slice(&[192, 168, 122, 2, 192, 168, 122, 3]);
    frame[46] = 0x50;
    raw
}
