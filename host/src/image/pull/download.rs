//! One blob: claimed, downloaded as far as it goes, taken up again, checked.
//!
//! # Invariants
//! 1. One try ends with what is there; the next begins with the byte after it.
//! 2. Tries have an end: they are counted anew only after as much progress as [`PROGRESS`].
//!
//! Dropping a download leaves what was written, unlocked, for the next.

use std::sync::atomic::Ordering;

use super::super::ImageError;
use super::super::config::sha256_of;
use super::super::content::{self, Claim, ContentLease, Finished, Partial};
use super::super::select::Descriptor;
use super::{COME_AGAIN, Pull, aside};
use crate::registry::{Attempts, Body, RegistryError};

/// How many bytes are written at once.
const STEP: usize = 256 * 1024;
/// How many bytes are progress: as often as they come, tries are counted anew.
const PROGRESS: u64 = 1024 * 1024;

impl Pull<'_> {
    /// A blob: found, waited for, or downloaded.
    pub(super) async fn fetch(&self, blob: &Descriptor) -> Result<ContentLease, ImageError> {
        let hex = sha256_of(&blob.digest)?;
        loop {
            let (dirs, name, size) = (self.dirs.clone(), hex.to_owned(), blob.size);
            match aside(move || content::claim(&dirs, &name, size)).await? {
                Claim::There(lease) => {
                    self.progress(blob.size);
                    return Ok(lease);
                }
                Claim::Busy => tokio::time::sleep(COME_AGAIN).await,
                Claim::Ours(partial) => {
                    if let Some(lease) = self.download(partial, blob).await? {
                        return Ok(lease);
                    }
                }
            }
        }
    }

    /// Downloads a blob; `None` if it is to be claimed anew.
    async fn download(
        &self,
        mut partial: Partial,
        blob: &Descriptor,
    ) -> Result<Option<ContentLease>, ImageError> {
        let mut attempts = Attempts::default();
        let mut wrong_once = false;
        self.progress(partial.done());
        loop {
            let before = partial.done();
            let endpoint = self.session.endpoint();
            let (host, transferred);
            (partial, host, transferred) = self.transfer(partial, blob).await?;
            if partial.done() >= before.saturating_add(PROGRESS) {
                attempts.progressed();
            }
            if let Err(error) = transferred {
                match attempts.again(error).await {
                    Ok(()) => {}
                    Err(error) if self.session.turn_from(endpoint) => {
                        tracing::warn!(%error, "a mirror does not give a blob");
                        attempts = Attempts::default();
                    }
                    Err(error) => return Err(error.into()),
                }
                continue;
            }
            match aside(move || partial.finish()).await? {
                Finished::Whole(lease) => return Ok(Some(lease)),
                Finished::Again => return Ok(None),
                // The beginning may have been damaged while it lay here.
                Finished::Wrong(emptied, _) if !wrong_once => {
                    wrong_once = true;
                    self.done.fetch_sub(blob.size, Ordering::Relaxed);
                    partial = emptied;
                }
                Finished::Wrong(emptied, found) => {
                    aside(move || emptied.discard()).await?;
                    return Err(ImageError::Registry(RegistryError::Digest {
                        host,
                        what: "a blob".to_owned(),
                        expected: blob.digest.clone(),
                        found: format!("sha256:{found}"),
                    }));
                }
            }
        }
    }

    /// One try: what is there afterwards, who sent it, and why it is not all.
    async fn transfer(
        &self,
        mut partial: Partial,
        blob: &Descriptor,
    ) -> Result<(Partial, String, Result<(), RegistryError>), ImageError> {
        if partial.done() == blob.size {
            return Ok((partial, "this host".to_owned(), Ok(())));
        }
        let asked = self.session.blob(&blob.digest, blob.size, partial.done()).await;
        let mut body = match asked {
            Ok(body) => body,
            Err(error) => return Ok((partial, String::new(), Err(error))),
        };
        let host = body.host().to_owned();
        if body.start() != partial.done() {
            self.done.fetch_sub(partial.done(), Ordering::Relaxed);
            partial = aside(move || partial.restart().map(|()| partial)).await?;
        }
        let (partial, received) = self.receive(partial, &mut body).await?;
        Ok((partial, host, received))
    }

    async fn receive(
        &self,
        mut partial: Partial,
        body: &mut Body,
    ) -> Result<(Partial, Result<(), RegistryError>), ImageError> {
        loop {
            let mut buffer = Vec::with_capacity(STEP);
            let ended = loop {
                match body.next().await {
                    Ok(Some(chunk)) => buffer.extend_from_slice(&chunk),
                    Ok(None) => break Some(Ok(())),
                    Err(error) => break Some(Err(error)),
                }
                if buffer.len() >= STEP {
                    break None;
                }
            };
            let count = buffer.len() as u64;
            if count > 0 {
                partial = aside(move || partial.write(&buffer).map(|()| partial)).await?;
                self.progress(count);
            }
            if let Some(ended) = ended {
                return Ok((partial, ended));
            }
        }
    }
}
