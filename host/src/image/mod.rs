//! Images: an archive in, one flattened read-only EROFS out.
//!
//! ```text
//!   tar stream (docker-save, OCI layout or the files of a root filesystem; also gzip or zstd)
//!     │ stream, tarball, archive     counted, capped, hashed; all of it in one file of ours
//!     ▼
//!   images/tmp/<random>/spool/
//!     │ wish, select, config         which images; blobs against their digests
//!     │ layer, tree, attributes      layers in order, whiteouts, owners, modes, times, xattrs
//!     ▼
//!   images/tmp/<random>/rootfs/
//!     │ erofs                        mkfs.erofs, dies with us and on cancel
//!     ▼
//!   images/tmp/<random>/out.erofs ─► images/blobs/sha256_<hex>.erofs (synced, then renamed)
//! ```
//!
//! [`pull`] gets the layers from a registry instead: `images/content/`, described there, in the place of
//! the spool; the rest of the way is the same.
//!
//! [`import`] is synchronous and long: call it on a thread for blocking work.
//!
//! # Invariants
//! 1. Layers are hostile. Everything is unpacked below one private directory with openat2
//!    (RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS); nothing is written outside it, ever.
//! 2. Digests are checked: each layer against the config's diff id, the config against its name
//!    where the archive names it by digest, OCI blobs against their descriptors.
//! 3. Counts and sizes are capped, and the cap that was met is named. What is not free on the disk, a
//!    reserve for others apart, is not taken; mkfs.erofs gets a limit of memory, and is the first to
//!    go where that runs out all the same.
//! 4. A blob is visible only when complete. What a crash leaves lies in `images/tmp/`, is locked
//!    (flock) only while its maker lives, and is swept by the next import and by `gc`; or it is a
//!    blob that no row names, which `gc` removes.
//! 5. A VM that runs from a blob holds a shared lock on it (`BlobLease`); a blob with a lease is
//!    not removed. [`import`] hands its blob over with the lease already taken, so that no `prune`
//!    can come between the import and the row that names the blob.
//!
//! # On error, stop and crash
//! On an error, and when the caller cancels, the temporary directory is removed before `import`
//! returns. After a crash it stays, unlocked, until it is swept.

use std::io;
use std::path::{Path, PathBuf};

use matchlock_failpoints::Area;
use matchlock_model::image::ImageConfig;

use crate::registry::RegistryError;

mod archive;
mod attributes;
mod blob;
mod build;
mod config;
pub mod content;
mod erofs;
mod fields;
mod garbage;
mod layer;
mod pull;
mod room;
mod roots;
mod select;
mod sparse;
mod stream;
mod tarball;
mod tree;
mod wish;
mod workspace;

pub use blob::{BlobLease, remove_blob, sweep_blobs};
pub use build::{Imported, import};
pub use garbage::{Garbage, GarbageKind, Garbages};
pub use pull::{PullProgress, PullRequest, PulledImage, TellPull, pull};
pub(crate) use room::free_beside_the_reserve;
pub use roots::blobs_of;
pub use wish::{Change, ImportWish, InvalidWish};
pub use workspace::{Swept, sweep_temporary, sweep_workspaces};

/// What a crash may come between.
pub const POINTS: Area = Area::new(
    "image",
    &["make_workspace", "build", "name_blob", "remove_workspace", "remove_blob", "sweep"],
);

/// What an import made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedImage {
    /// The image's digest: the config's, `sha256:` and 64 hex digits.
    pub digest: String,
    /// The EROFS file, absolute.
    pub rootfs_path: PathBuf,
    /// The name of the blob's content: `sha256:` over the diff ids, as the reference makes it.
    pub rootfs_digest: String,
    /// The bytes it takes on disk.
    pub size: u64,
    /// How many layers were flattened.
    pub layers: usize,
    /// The digest of each of them, uncompressed, lowest first.
    pub diff_ids: Vec<String>,
    /// How to run it.
    pub config: ImageConfig,
}

/// What an import is doing; for a progress line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportProgress {
    /// The archive is being read.
    Receiving {
        /// The bytes read so far.
        bytes: u64,
    },
    /// A layer is being verified and, unless the root filesystem is here already, unpacked.
    Layer {
        /// Which, from one.
        number: usize,
        /// Of how many.
        of: usize,
    },
    /// The EROFS is being made.
    Building,
    /// The root filesystem was here already: nothing is built.
    Reused,
    /// Something in a layer that this host cannot keep was left out; said once for each kind.
    LeftOut {
        /// What.
        what: String,
    },
}

/// How much an archive may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportLimits {
    /// The bytes of the archive and of all unpacked files.
    pub max_bytes: u64,
    /// The entries of all layers together.
    pub max_entries: u64,
    /// The bytes of memory that mkfs.erofs may take.
    pub max_build_memory: u64,
    /// The layers.
    pub max_layers: usize,
    /// The bytes of a JSON document in the archive.
    pub max_json_bytes: u64,
}

impl Default for ImportLimits {
    fn default() -> Self {
        Self {
            max_bytes: 64 * 1024 * 1024 * 1024,
            // The largest images in use have half of it; each takes memory of the build.
            max_entries: 1_000_000,
            max_build_memory: room::default_memory(),
            max_layers: 512,
            max_json_bytes: 8 * 1024 * 1024,
        }
    }
}

/// Why an image could not be imported, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The stream is not an archive that we know.
    #[error("this is not an image archive: {what}")]
    NotAnArchive {
        /// What was found or missing.
        what: String,
    },
    /// The archive contradicts itself or is cut off.
    #[error("the image archive is damaged: {what}")]
    Damaged {
        /// What is wrong, and where.
        what: String,
    },
    /// The archive tries something that no image needs.
    #[error("the image archive is refused: {what}")]
    Hostile {
        /// What it tried, and where.
        what: String,
    },
    /// The archive does not hold what is asked of it.
    #[error("{what}")]
    Wish {
        /// What was asked for, and what there is.
        what: String,
    },
    /// The archive is over a limit.
    #[error("the image is over the limit of {limit}")]
    TooLarge {
        /// The limit, with its unit.
        limit: String,
    },
    /// A file operation of ours failed.
    #[error("could not {doing} {path}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The standard input failed.
    #[error("could not read the image archive")]
    Read(#[source] io::Error),
    /// mkfs.erofs is not installed.
    #[error("mkfs.erofs is not installed: install the package erofs-utils")]
    NoMkfsErofs,
    /// mkfs.erofs failed.
    #[error("mkfs.erofs failed ({status}): {stderr}")]
    MkfsErofs {
        /// Its exit status.
        status: String,
        /// The end of what it printed.
        stderr: String,
    },
    /// Only root can give files their owners.
    #[error(
        "importing an image needs root: it sets owners, devices and file capabilities; run it with sudo"
    )]
    NeedsRoot,
    /// The image is for another kind of machine.
    #[error("the image is for {image}, and this host runs {host}: get the image for {host}")]
    Platform {
        /// What the image is for.
        image: String,
        /// What this host runs.
        host: String,
    },
    /// The image is not for the platform that was asked for.
    #[error("the image is for {image}, not for {wanted}")]
    NoSuchPlatform {
        /// What the image is for.
        image: String,
        /// What was asked for.
        wanted: String,
    },
    /// The registry did not give it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// It does not fit on the disk.
    #[error(
        "no space in {path}: it needs {needed} bytes, and {free} are free, {reserve} for others apart; \
         `matchlock image gc` removes what no image needs"
    )]
    NoSpace {
        /// Where it was to be put.
        path: PathBuf,
        /// How much.
        needed: u64,
        /// How much there is, without the reserve.
        free: u64,
        /// How much stays free for others.
        reserve: u64,
    },
    /// What is in the registry is no image for containers.
    #[error("{what} is not a container image: {why}")]
    NotAnImage {
        /// What was pulled.
        what: String,
        /// Why it is none.
        why: String,
    },
    /// The work was given up by the thread that did it.
    #[error("the work on the image ended unexpectedly: {0}")]
    Lost(String),
    /// The caller cancelled the import.
    #[error("the import was cancelled")]
    Cancelled,
    /// A root filesystem that an image names is not there.
    #[error(
        "{path}, the root filesystem of the image, is missing or empty: import the image again"
    )]
    NoBlob {
        /// The blob.
        path: PathBuf,
    },
    /// A path that was to be removed as a blob is none.
    #[error("{path} is not a file directly below {blobs}")]
    NotABlob {
        /// What was given.
        path: PathBuf,
        /// Where blobs are.
        blobs: PathBuf,
    },
    /// A VM runs from it, or a pull or an import is about to name it.
    #[error(
        "{path} is in use by a running VM, or by a pull or an import that goes on: stop the VM first (matchlock list, matchlock kill), or wait"
    )]
    InUse {
        /// The blob.
        path: PathBuf,
    },
}

impl ImageError {
    /// Whether the disk is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        use rustix::io::Errno;
        let full = [Errno::NOSPC, Errno::DQUOT].map(|errno| Some(errno.raw_os_error()));
        match self {
            Self::NoSpace { .. } => true,
            Self::File { source, .. } => full.contains(&source.raw_os_error()),
            _ => false,
        }
    }
}

/// The directories of the image store, below `$MATCHLOCK_CACHE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageDirs {
    /// `images/`.
    pub images: PathBuf,
}

impl ImageDirs {
    /// The directories below this cache.
    #[must_use]
    pub fn new(cache: &Path) -> Self {
        Self { images: cache.join("images") }
    }

    /// `images/blobs/`.
    #[must_use]
    pub fn blobs(&self) -> PathBuf {
        self.images.join("blobs")
    }

    /// The root filesystem of this content (64 hex digits).
    fn blob(&self, content: &str) -> PathBuf {
        self.blobs().join(format!("sha256_{content}.erofs"))
    }

    /// `images/tmp/`.
    #[must_use]
    pub fn tmp(&self) -> PathBuf {
        self.images.join("tmp")
    }

    /// `images/content/`: what was downloaded.
    #[must_use]
    pub fn content(&self) -> PathBuf {
        self.images.join("content")
    }

    /// The same, independent of the working directory.
    pub(crate) fn absolute(&self) -> Result<Self, ImageError> {
        let images = std::path::absolute(&self.images);
        let images = images.map_err(|error| workspace::failed("find", &self.images, error))?;
        Ok(Self { images })
    }

    /// `images/metadata.db`.
    #[must_use]
    pub fn metadata(&self) -> PathBuf {
        self.images.join("metadata.db")
    }
}
