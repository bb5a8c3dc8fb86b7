//! Lines and descriptors over a Unix stream socket.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::tap::QUEUES_MAX;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Bytes read at a time.
const READ_BYTES: usize = 4096;
/// Descriptors of one message at most: the queues of both ends of a VMM's wire and a netlink socket; of a guest's
/// tap there are fewer. The kernel closes what comes beyond.
const FDS_PER_MESSAGE: usize = 2 * QUEUES_MAX as usize + 1;
/// Descriptors held for lines that are not complete yet; what comes beyond is closed at once, so that
/// a client can't fill the process's table.
const FDS_HELD_MAX: usize = FDS_PER_MESSAGE;

/// Puts lines together, and keeps the descriptors that came along.
///
/// A descriptor belongs to the line that was under way when it arrived, and is closed when that line
/// is done with: one that a request did not ask for never becomes another request's. (The kernel ends
/// a read behind the bytes that carried descriptors, so theirs is the last line in it.)
#[derive(Debug)]
pub struct LineReader {
    buffer: Vec<u8>,
    searched: usize,
    /// With the number of their line.
    fds: VecDeque<(u64, OwnedFd)>,
    /// Number of the line that [`LineReader::next_line`] gives next.
    line: u64,
    line_bytes_max: usize,
}

/// What a read brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// Bytes, maybe a line.
    Some,
    /// The peer has closed.
    Closed,
}

impl LineReader {
    /// A reader that refuses longer lines.
    pub fn new(line_bytes_max: usize) -> Self {
        Self {
            buffer: Vec::new(),
            searched: 0,
            fds: VecDeque::new(),
            line: 0,
            line_bytes_max,
        }
    }

    /// Reads once.
    ///
    /// # Errors
    /// Of `recvmsg`, `WouldBlock` included.
    pub fn read_from(&mut self, socket: impl AsFd) -> io::Result<Read> {
        let mut bytes = [0; READ_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        self.buffer.extend_from_slice(&bytes[..received.bytes]);
        self.close_before(self.line);
        let mut fds = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        if let Some(fds) = fds.next() {
            let under_way = self.buffer.iter().rev().skip(1);
            let ended = under_way.filter(|&&byte| byte == b'\n').count();
            let line = self.line + ended as u64;
            let room = FDS_HELD_MAX - self.fds.len();
            // Closes what comes beyond.
            self.fds.extend(fds.map(|fd| (line, fd)).take(room));
        }
        Ok(if received.bytes == 0 {
            Read::Closed
        } else {
            Read::Some
        })
    }

    /// The next complete line, without its end.
    ///
    /// # Errors
    /// The line is longer than allowed: the peer is beyond understanding, close the connection.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, String> {
        let end = self.buffer[self.searched..]
            .iter()
            .position(|&byte| byte == b'\n');
        let Some(end) = end.map(|end| self.searched + end) else {
            self.searched = self.buffer.len();
            if self.buffer.len() > self.line_bytes_max {
                return Err(format!(
                    "a message is longer than {} bytes",
                    self.line_bytes_max
                ));
            }
            return Ok(None);
        };
        if end > self.line_bytes_max {
            return Err(format!(
                "a message is longer than {} bytes",
                self.line_bytes_max
            ));
        }
        let rest = self.buffer.split_off(end + 1);
        let mut line = std::mem::replace(&mut self.buffer, rest);
        line.pop();
        self.searched = 0;
        self.close_before(self.line);
        self.line += 1;
        Ok(Some(line))
    }

    /// A descriptor that came with the line that [`LineReader::next_line`] gave last.
    pub fn take_fd(&mut self) -> Option<OwnedFd> {
        let (line, _) = self.fds.front()?;
        if line + 1 != self.line {
            return None;
        }
        self.fds.pop_front().map(|(_, fd)| fd)
    }

    /// All of them that are left.
    pub fn take_fds(&mut self) -> Vec<OwnedFd> {
        std::iter::from_fn(|| self.take_fd()).collect()
    }

    /// Closes the descriptors of lines before this one.
    fn close_before(&mut self, line: u64) {
        self.fds.retain(|&(of, _)| of >= line);
    }

    /// Closes descriptors nobody asked for.
    pub fn drop_fds(&mut self) {
        self.fds.clear();
    }
}

/// Sends as many of the bytes as the socket takes, the descriptors with the first of them.
///
/// # Errors
/// Of `sendmsg`, `WouldBlock` included.
pub fn send_some(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = rustix::net::sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(sent)
}

/// A message as a line.
///
/// # Errors
/// Of the serializer.
pub fn to_line(message: &impl serde::Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn lines_are_cut_out_of_any_chunks() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut reader = LineReader::new(100);
        a.write_all(b"one\ntwo\nthr").unwrap();
        reader.read_from(&b).unwrap();
        assert_eq!(reader.next_line().unwrap().unwrap(), b"one");
        assert_eq!(reader.next_line().unwrap().unwrap(), b"two");
        assert_eq!(reader.next_line().unwrap(), None);
        a.write_all(b"ee\n").unwrap();
        reader.read_from(&b).unwrap();
        assert_eq!(reader.next_line().unwrap().unwrap(), b"three");
        drop(a);
        assert_eq!(reader.read_from(&b).unwrap(), Read::Closed);
    }

    #[test]
    fn endless_line_is_refused() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut reader = LineReader::new(100);
        a.write_all(&[b'x'; 101]).unwrap();
        reader.read_from(&b).unwrap();
        assert!(reader.next_line().is_err());
    }

    #[test]
    fn a_descriptor_nobody_asked_for_is_not_the_next_line_s() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut reader = LineReader::new(100);
        let (stray, wanted) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        // All at once, the stray one first; the second line comes in two pieces.
        send_some(&a, b"status\n", &[stray.0.as_fd()]).unwrap();
        send_some(&a, b"status\n", &[]).unwrap();
        send_some(&a, b"att", &[wanted.0.as_fd()]).unwrap();
        send_some(&a, b"ach\n", &[]).unwrap();
        let mut taken = Vec::new();
        while taken.len() < 3 {
            match reader.next_line().unwrap() {
                Some(line) if line == b"attach" => taken.push(reader.take_fd().is_some()),
                // As a server does with a request that takes none.
                Some(_) => taken.push(false),
                None => drop(reader.read_from(&b).unwrap()),
            }
        }
        assert_eq!(taken, [false, false, true]);
        drop((stray.0, wanted.0));
        let mut end = LineReader::new(1);
        assert_eq!(end.read_from(&stray.1).unwrap(), Read::Closed);
        assert_eq!(end.read_from(&wanted.1).unwrap(), Read::Closed);
    }

    #[test]
    fn a_descriptor_comes_with_its_line_and_floods_are_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        let (probe, kept) = UnixStream::pair().unwrap();
        let mut reader = LineReader::new(100);
        for _ in 0..FDS_HELD_MAX + 8 {
            send_some(&a, b"x\n", &[kept.as_fd()]).unwrap();
            reader.read_from(&b).unwrap();
        }
        drop(kept);
        assert!(reader.take_fd().is_none(), "of no line yet");
        for _ in 0..FDS_HELD_MAX {
            reader.next_line().unwrap().unwrap();
            assert!(reader.take_fd().is_some());
            assert!(reader.take_fd().is_none());
        }
        reader.next_line().unwrap().unwrap();
        assert!(reader.take_fd().is_none());
        // Every copy is closed: the probe sees the end.
        let mut end = LineReader::new(1);
        assert_eq!(end.read_from(&probe).unwrap(), Read::Closed);
    }
}
