//! One blob: claimed, downloaded as far as it goes, taken up again, checked.
//!
//! # Invariants
//! 1. One try ends with what is there; the next begins with the byte after it.
//! 2. Tries have an end: they are counted anew only when as much more of the blob is there than ever
//!    before as [`PROGRESS`], and a registry that cannot go on where it ended has few of them.
//! 3. Another process that downloads the same is waited for only as long as it gets on.
//!
//! Dropping a download leaves what was written, unlocked, for the next.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

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
/// How often a blob may begin from its first byte again and count as progress.
const RESTARTS: u32 = 8;
/// How long another process may be in getting as far as [`ENOUGH`].
const PATIENCE: Duration = Duration::from_secs(10);
/// How many bytes more make it worth waiting for: about what the slowest line brings.
const ENOUGH: u64 = 256 * 1024;

/// The download of the same blob by another process, as it is seen from here.
struct Theirs {
    looked: Instant,
    had: u64,
    /// Whether the user knows what is waited for.
    is_said: bool,
}

impl Theirs {
    /// Whether it gets on too slowly to be waited for; it has so many bytes now.
    fn is_stalled(&mut self, now: Instant, has: u64) -> bool {
        if now.duration_since(self.looked) < PATIENCE {
            return false;
        }
        let grown = has.saturating_sub(self.had);
        (self.looked, self.had) = (now, has);
        grown < ENOUGH
    }
}

/// How far a download has got, and what of that counts.
struct Progressed {
    reached: u64,
    restarts: u32,
}

impl Progressed {
    /// Whether a try has made progress after which tries are counted anew.
    fn by(&mut self, done: u64, restarted: bool) -> bool {
        self.restarts += u32::from(restarted);
        let is_enough = done >= self.reached.saturating_add(PROGRESS);
        if is_enough {
            self.reached = done;
        }
        is_enough && self.restarts <= RESTARTS
    }
}

/// One try: what is there afterwards, who sent it, and why it is not all.
struct Tried {
    partial: Partial,
    host: String,
    restarted: bool,
    result: Result<(), RegistryError>,
}

impl Pull<'_> {
    /// A blob: found, waited for, or downloaded.
    pub(super) async fn fetch(&self, blob: &Descriptor) -> Result<ContentLease, ImageError> {
        let hex = sha256_of(&blob.digest)?;
        let mut theirs = None;
        loop {
            let (dirs, name, size) = (self.dirs.clone(), hex.to_owned(), blob.size);
            match aside(move || content::claim(&dirs, &name, size)).await? {
                Claim::There(lease) => {
                    self.progress(blob.size);
                    return Ok(lease);
                }
                Claim::Busy => match self.wait(hex, &mut theirs).await? {
                    Some(partial) => {
                        if let Some(lease) = self.download(partial, blob).await? {
                            return Ok(lease);
                        }
                    }
                    None => tokio::time::sleep(COME_AGAIN).await,
                },
                Claim::Ours(partial) => {
                    if let Some(lease) = self.download(partial, blob).await? {
                        return Ok(lease);
                    }
                }
            }
        }
    }

    /// Looks at what another process does with this blob; a download of our own once that is too
    /// slow: it may be from a registry that blocks us on purpose.
    async fn wait(
        &self,
        hex: &str,
        theirs: &mut Option<Theirs>,
    ) -> Result<Option<Partial>, ImageError> {
        let (dirs, name) = (self.dirs.clone(), hex.to_owned());
        let Some(has) = aside(move || content::begun(&dirs, &name)).await? else {
            return Ok(None);
        };
        let now = Instant::now();
        let Some(theirs) = theirs else {
            *theirs = Some(Theirs { looked: now, had: has, is_said: false });
            return Ok(None);
        };
        let is_long = now.duration_since(theirs.looked) >= PATIENCE;
        if !theirs.is_stalled(now, has) {
            if is_long && !std::mem::replace(&mut theirs.is_said, true) {
                tracing::warn!(blob = hex, "waiting for another process that downloads it");
            }
            return Ok(None);
        }
        let (dirs, name) = (self.dirs.clone(), hex.to_owned());
        let own = aside(move || content::own(&dirs, &name)).await?;
        if own.is_some() {
            tracing::warn!(
                blob = hex,
                "another process downloads it and hardly gets on: it is downloaded beside that"
            );
        } else {
            tracing::warn!(blob = hex, "waiting for another process that downloads it slowly");
        }
        Ok(own)
    }

    /// Downloads a blob; `None` if it is to be claimed anew.
    async fn download(
        &self,
        mut partial: Partial,
        blob: &Descriptor,
    ) -> Result<Option<ContentLease>, ImageError> {
        let mut attempts = Attempts::default();
        let mut progressed = Progressed { reached: partial.done(), restarts: 0 };
        let mut wrong_once = false;
        self.progress(partial.done());
        loop {
            let endpoint = self.session.endpoint();
            let tried = self.transfer(partial, blob).await?;
            partial = tried.partial;
            if progressed.by(partial.done(), tried.restarted) {
                attempts.progressed();
            }
            if let Err(error) = tried.result {
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
            let (emptied, found) = match aside(move || partial.finish()).await? {
                Finished::Whole(lease) => return Ok(Some(lease)),
                Finished::Again => return Ok(None),
                Finished::Wrong(emptied, found) => (emptied, found),
            };
            partial = emptied;
            self.done.fetch_sub(blob.size, Ordering::Relaxed);
            let error = RegistryError::Digest {
                host: tried.host,
                what: "a blob".to_owned(),
                expected: blob.digest.clone(),
                found: format!("sha256:{found}"),
            };
            // The beginning may have been damaged while it lay here.
            if !std::mem::replace(&mut wrong_once, true) {
                tracing::debug!(%error, "once more, from the beginning");
            } else if self.session.turn_from(endpoint) {
                tracing::warn!(%error, "a mirror gives a wrong blob");
                attempts = Attempts::default();
            } else {
                aside(move || partial.discard()).await?;
                return Err(error.into());
            }
        }
    }

    async fn transfer(&self, mut partial: Partial, blob: &Descriptor) -> Result<Tried, ImageError> {
        if partial.done() == blob.size {
            let host = "this host".to_owned();
            return Ok(Tried { partial, host, restarted: false, result: Ok(()) });
        }
        let asked = self.session.blob(&blob.digest, blob.size, partial.done()).await;
        let mut body = match asked {
            Ok(body) => body,
            Err(error) => {
                let host = String::new();
                return Ok(Tried { partial, host, restarted: false, result: Err(error) });
            }
        };
        let host = body.host().to_owned();
        let restarted = body.start() != partial.done();
        if restarted {
            self.done.fetch_sub(partial.done(), Ordering::Relaxed);
            partial = aside(move || partial.restart().map(|()| partial)).await?;
        }
        let (partial, result) = self.receive(partial, &mut body).await?;
        Ok(Tried { partial, host, restarted, result })
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn only_what_was_never_there_before_is_progress() {
        let mut progressed = Progressed { reached: 0, restarts: 0 };
        assert!(progressed.by(3 * MIB, false));
        for _ in 0..5 {
            assert!(!progressed.by(MIB, true) && !progressed.by(3 * MIB, true));
        }
        assert!(!progressed.by(9 * MIB, false), "it has begun anew too often");
        let mut progressed = Progressed { reached: 0, restarts: 0 };
        let steps = [MIB / 2, MIB, MIB + MIB / 2, 2 * MIB];
        assert_eq!(steps.map(|done| progressed.by(done, false)), [false, true, false, true]);
    }

    #[test]
    fn a_download_that_drips_is_not_waited_for() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut theirs = Theirs { looked: began, had: 0, is_said: false };
        assert!(!theirs.is_stalled(at(9), 3));
        assert!(theirs.is_stalled(at(10), 4));
        assert!(!theirs.is_stalled(at(11), 5));
        assert!(!theirs.is_stalled(at(20), ENOUGH + 4));
        assert!(theirs.is_stalled(at(40), ENOUGH + 5));
        // It has begun anew.
        assert!(theirs.is_stalled(at(60), 0));
    }
}
