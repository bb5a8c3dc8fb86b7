//! A forward on its way from one worker to another, with what waits for its guest.

use std::net::SocketAddr;

use super::ForwardId;
use super::active::{ListenerKind, Waiting};
use super::directory::Memory;
use crate::frame::Instant;

/// A forward's sockets, `S` each, and what came in by them.
#[derive(Debug)]
pub struct Moved<S> {
    /// Which forward.
    pub forward: ForwardId,
    /// Who has its guest's name.
    pub(super) memory: Memory,
    pub(super) listeners: Vec<MovedListener<S>>,
    pub(super) parked: Vec<MovedParked<S>>,
}

/// A listening socket.
#[derive(Debug)]
pub(super) struct MovedListener<S> {
    pub socket: S,
    pub kind: ListenerKind,
    pub guest_port: u16,
    pub held: Vec<Waiting>,
}

/// A connection that waits for its guest.
#[derive(Debug)]
pub(super) struct MovedParked<S> {
    pub socket: S,
    pub client: Option<SocketAddr>,
    pub guest_port: u16,
    /// When it is given up.
    pub until: Instant,
}

impl<S> Moved<S> {
    /// With other sockets in place of these; those that there are none for stay behind.
    pub fn exchange<T>(self, mut exchange: impl FnMut(S) -> Option<T>) -> Moved<T> {
        let listeners = self.listeners.into_iter().filter_map(|listener| {
            Some(MovedListener {
                socket: exchange(listener.socket)?,
                kind: listener.kind,
                guest_port: listener.guest_port,
                held: listener.held,
            })
        });
        let listeners = listeners.collect();
        let parked = self.parked.into_iter().filter_map(|parked| {
            Some(MovedParked {
                socket: exchange(parked.socket)?,
                client: parked.client,
                guest_port: parked.guest_port,
                until: parked.until,
            })
        });
        Moved {
            forward: self.forward,
            memory: self.memory,
            listeners,
            parked: parked.collect(),
        }
    }
}
