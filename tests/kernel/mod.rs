//! Frames and the helper, for the tests that run on the real kernel.
#![allow(dead_code)] // Each test binary uses a part.

use std::fs;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lanlet::frame::{Frame, Mac};
use lanlet::offload::{Csum, Gso, Offload};
use lanlet::tap::{Helper, HelperEvents};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_lanlet");
pub const MSS: u16 = 1448;

pub fn spawn_helper() -> (Helper, HelperEvents) {
    let program = std::env::var_os("LANLET_TEST_PROGRAM").map_or(PROGRAM.into(), PathBuf::from);
    Helper::spawn(Some(&program)).unwrap()
}

/// Runs this very test program as an ordinary user, from a place where that user finds it.
pub fn run_as_nobody(arguments: &[&str]) {
    let directory = std::env::temp_dir().join(format!("lanlet-nobody.{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let copy = |from: &Path| {
        let to = directory.join(from.file_name().unwrap());
        fs::copy(from, &to).unwrap();
        to
    };
    let tests = copy(&std::env::current_exe().unwrap());
    let program = copy(Path::new(PROGRAM));
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(tests)
        .args(arguments)
        .env("LANLET_TEST_PROGRAM", program)
        .env_remove("XDG_RUNTIME_DIR")
        .current_dir("/")
        .output()
        .unwrap();
    fs::remove_dir_all(&directory).unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}

/// Calls `poll` until it yields something, for five seconds at most.
pub fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        if let Some(result) = poll() {
            return result;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn seqpacket_pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// A frame copied out of its batch.
pub struct Received {
    pub bytes: Vec<u8>,
    pub offload: Offload,
}

impl Received {
    pub fn new(frame: Frame<'_>) -> Self {
        Self {
            bytes: frame.bytes.to_vec(),
            offload: frame.offload,
        }
    }

    pub fn as_frame(&self) -> Frame<'_> {
        Frame {
            bytes: &self.bytes,
            offload: self.offload,
        }
    }
}

pub fn as_frame(bytes: &[u8]) -> Frame<'_> {
    Frame {
        bytes,
        offload: Offload::default(),
    }
}

const MACS: [u8; 12] = [0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 3];

/// A frame of an experimental EtherType (IEEE 802 local experimental 1).
pub fn plain_frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|n| (n * 7) as u8).collect();
    frame[..12].copy_from_slice(&MACS);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// An IPv4/TCP frame with a pseudo-header sum in its checksum, and where TCP starts.
pub fn tcp_frame(payload: usize, vlan: Option<u16>) -> (Vec<u8>, u16) {
    let mut frame = MACS.to_vec();
    if let Some(tci) = vlan {
        frame.extend([0x81, 0x00]);
        frame.extend(tci.to_be_bytes());
    }
    frame.extend([0x08, 0x00]);
    let ip = frame.len();
    let total = (40 + payload) as u16;
    frame.extend([0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let checksum = !fold(sum(&frame[ip..ip + 20]));
    frame[ip + 10..ip + 12].copy_from_slice(&checksum.to_be_bytes());
    let tcp = frame.len();
    frame.extend([
        0x30, 0x39, 0x14, 0x51, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
    ]);
    let pseudo = fold(pseudo_sum(&frame[ip..]));
    frame[tcp + 16..tcp + 18].copy_from_slice(&pseudo.to_be_bytes());
    frame.extend((0..payload).map(|n| (n * 13) as u8));
    (frame, tcp as u16)
}

/// `frame` of [`tcp_frame`] as the switch hands it to a port.
pub fn tcp_super_frame(bytes: &[u8], start: u16) -> Frame<'_> {
    let offload = Offload {
        csum: Csum::Partial { start, offset: 16 },
        gso: Gso::Tcp4(MSS),
        ecn: false,
    };
    Frame { bytes, offload }
}

/// A guest's header for a frame of [`tcp_frame`].
pub fn tso_header(start: u16) -> [u8; 12] {
    let mut header = [0; 12];
    header[..2].copy_from_slice(&[1, 1]);
    header[2..4].copy_from_slice(&(start + 20).to_le_bytes());
    header[4..6].copy_from_slice(&MSS.to_le_bytes());
    header[6..8].copy_from_slice(&start.to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    header
}

pub fn tcp_checksum_is_right(frame: &[u8]) -> bool {
    fold(pseudo_sum(&frame[14..]) + sum(&frame[34..])) == 0xffff
}

pub fn udp_checksum_is_right(frame: &[u8]) -> bool {
    fold(pseudo_sum(&frame[14..]) + sum(&frame[34..])) == 0xffff
}

fn pseudo_sum(ip: &[u8]) -> u64 {
    let len = u64::from(u16::from_be_bytes([ip[2], ip[3]])) - 20;
    sum(&ip[12..20]) + u64::from(ip[9]) + len
}

fn sum(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| low.into());
    bytes.chunks(2).map(word).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The answer to an ARP request, whatever address it asks for.
pub fn arp_reply(request: &[u8], mac: Mac) -> Option<Vec<u8>> {
    if request.get(12..14)? != [8, 6] || request.get(20..22)? != [0, 1] {
        return None;
    }
    let mut reply = request[..42].to_vec();
    reply[..6].copy_from_slice(&request[6..12]);
    reply[6..12].copy_from_slice(&mac.0);
    reply[21] = 2;
    reply[22..28].copy_from_slice(&mac.0);
    reply[28..32].copy_from_slice(&request[38..42]);
    reply[32..42].copy_from_slice(&request[22..32]);
    Some(reply)
}

/// Writes as a VMM does.
pub fn write_vnet(tap: &OwnedFd, header: &[u8], frame: &[u8]) {
    let parts = [IoSlice::new(header), IoSlice::new(frame)];
    assert_eq!(
        rustix::io::writev(tap, &parts).unwrap(),
        header.len() + frame.len()
    );
}

/// Reads as a VMM does: header and frame, or nothing.
pub fn read_vnet(tap: &OwnedFd) -> Option<([u8; 12], Vec<u8>)> {
    let mut buffer = vec![0; 70_000];
    match rustix::io::read(tap, &mut buffer[..]) {
        Ok(len) => Some((buffer[..12].try_into().unwrap(), buffer[12..len].to_vec())),
        Err(rustix::io::Errno::AGAIN) => None,
        Err(error) => panic!("read: {error}"),
    }
}
