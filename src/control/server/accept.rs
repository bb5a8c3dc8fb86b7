//! Taking clients in: who may come, how many at a time, and what happens when the socket's file goes.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::unix::pipe::Receiver;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::{Shared, serve};
use crate::control::api::Reply;
use crate::control::message::{send_some, to_line};
use crate::control::{Claim, ControlError};
use crate::sys::peer::{self, Refusal};

/// Clients at a time that have asked for nothing yet. The next ones wait in the kernel's queue.
const NEWCOMERS_MAX: usize = 32;
/// Pause between two tries to make a socket in place of one that was removed: the user may log in again.
const RENEW_RETRY: Duration = Duration::from_secs(1);
/// Pause after a failed accept (out of descriptors), so that the loop does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves clients, at another socket where the first was removed. Connections go on meanwhile.
pub(super) async fn keep_serving(
    listener: std::os::unix::net::UnixListener,
    claim: &mut Claim,
    shared: &Arc<Shared>,
) -> io::Result<()> {
    let newcomers = Arc::new(Semaphore::new(NEWCOMERS_MAX));
    let mut listener = UnixListener::from_std(listener)?;
    loop {
        tokio::select! {
            () = accept(&listener, &newcomers, shared) => return Ok(()),
            () = wait_for_removal(claim) => {}
        }
        let name = &shared.name;
        let mut warned = false;
        listener = loop {
            match claim.renew() {
                Ok(listener) => break UnixListener::from_std(listener)?,
                Err(ControlError::Busy { pid, .. }) => {
                    let pid = pid.map(|pid| format!(", pid {pid},")).unwrap_or_default();
                    let reason =
                        format!("its socket was removed, and another process{pid} has its name");
                    match claim.is_private {
                        // Its command goes on, it is only not seen.
                        true => log::warn!("network '{name}' is not listed any more: {reason}"),
                        false => (shared.on_stop)(reason),
                    }
                    return std::future::pending().await;
                }
                Err(error) if !std::mem::replace(&mut warned, true) => log::warn!(
                    "the control socket of network '{name}' was removed, and no command reaches it until \
                     there can be another: {error}"
                ),
                Err(_) => {}
            }
            tokio::time::sleep(RENEW_RETRY).await;
        };
        log::warn!("the control socket of network '{name}' was removed; there is another now");
    }
}

/// Returns when the socket or the lock file is where it was no longer.
async fn wait_for_removal(claim: &Claim) {
    // Without inotify (fs.inotify.max_user_instances) it is looked for by the clock. Tokio waits for any
    // descriptor that can be read as for a pipe's.
    let watch = claim
        .watch()
        .and_then(Receiver::from_owned_fd_unchecked)
        .ok();
    let mut events = [0; 4096];
    while claim.is_in_place() {
        let Some(watch) = &watch else {
            tokio::time::sleep(RENEW_RETRY).await;
            continue;
        };
        if watch.readable().await.is_ok() {
            let _ = watch.try_read(&mut events);
        }
    }
}

async fn accept(listener: &UnixListener, newcomers: &Arc<Semaphore>, shared: &Arc<Shared>) {
    let mut warned = false;
    loop {
        // First, so that who has no place yet waits in the kernel's queue and takes no descriptor.
        let Ok(place) = Arc::clone(newcomers).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                // At once: of who is refused there is never more than one.
                if let Err(refusal) = peer::check(stream.as_fd(), false) {
                    log::warn!("{refusal} at the control socket");
                    refuse(&stream, &refusal);
                    continue;
                }
                let shared = Arc::clone(shared);
                tokio::spawn(async move {
                    if let Err(error) = serve(&stream, &shared, place).await {
                        log::debug!("control connection: {error}");
                    }
                });
            }
            Err(error) => {
                if !std::mem::replace(&mut warned, true) {
                    log::warn!("cannot accept on the control socket: {error}");
                }
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Tells a peer why it is not served, if that needs no waiting. Another user is told nothing.
fn refuse(stream: &UnixStream, refusal: &Refusal) {
    let message = match refusal {
        Refusal::User(_) => return,
        Refusal::Guest => "the control socket is closed to guests".to_owned(),
        Refusal::Unknown(error) => {
            format!("the control socket is closed to guests, and you may be one: {error}")
        }
    };
    if let Ok(line) = to_line(&Reply::Error { message }) {
        // A fresh socket has room for it.
        let _ = send_some(stream.as_fd(), &line, &[]);
    }
}
