//! The actor.

use std::fmt;
use std::io::Read;
use std::sync::Arc;

use jiff::Timestamp;
use matchlock_host::image::{
    Garbages, ImageDirs, ImportLimits, ImportWish, ImportedImage, PullRequest, TellPull,
};
use matchlock_host::registry::RegistrySettings;
use matchlock_model::failure::Failure;
use matchlock_model::image::ImageRecord;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio_util::sync::CancellationToken;

use super::pull::{self, Pulled};
use super::work;
use crate::points;

/// The archive.
pub type ImportInput = Box<dyn Read + Send>;

/// What the images are asked.
pub enum ImagesMsg {
    /// Import an archive.
    Import {
        /// The archive.
        input: ImportInput,
        /// What is wanted of it.
        wish: ImportWish,
        /// Cancels the import.
        cancel: CancellationToken,
        /// The images, at least one.
        reply: RpcReplyPort<Result<Vec<TaggedImport>, Failure>>,
    },
    /// Pull an image from its registry.
    Pull {
        /// Which.
        request: PullRequest,
        /// Is told what it does.
        tell: TellPull,
        /// Cancels the pull.
        cancel: CancellationToken,
        /// The image.
        reply: RpcReplyPort<Result<Pulled, Failure>>,
    },
    /// Remove a tag, and its blob if nothing else uses it.
    Remove {
        /// The tag.
        tag: String,
        /// What was removed.
        reply: RpcReplyPort<Result<RemovedImage, Failure>>,
    },
    /// Give an image another tag.
    Tag {
        /// The image.
        source: String,
        /// The tag that it gets as well.
        tag: String,
        /// The image under its new tag.
        reply: RpcReplyPort<Result<ImageRecord, Failure>>,
    },
    /// Remove what imports and removals left that did not end.
    Sweep {
        /// Only look.
        dry_run: bool,
        /// What was found. What could not be looked at is in there.
        reply: RpcReplyPort<Result<Garbages, Failure>>,
    },
}

/// An image that was imported, and its tags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaggedImport {
    /// At least one.
    pub tags: Vec<String>,
    /// What it is.
    pub image: ImportedImage,
}

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovedImage {
    /// The row that was removed.
    pub record: ImageRecord,
    /// Whether the blob went too.
    pub blob_removed: bool,
}

impl fmt::Debug for ImagesMsg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Import { .. } => "Import",
            Self::Pull { .. } => "Pull",
            Self::Remove { .. } => "Remove",
            Self::Tag { .. } => "Tag",
            Self::Sweep { .. } => "Sweep",
        })
    }
}

/// What the actor is started with.
#[derive(Debug, Clone)]
pub struct ImagesArgs {
    /// Where images are.
    pub dirs: ImageDirs,
    /// How much an archive may ask for.
    pub limits: ImportLimits,
    /// What the user said of registries.
    pub registries: RegistrySettings,
    /// The time.
    pub now: fn() -> Timestamp,
}

/// The actor.
#[derive(Debug)]
pub struct Images;

impl Actor for Images {
    type Msg = ImagesMsg;
    type State = Arc<ImagesArgs>;
    type Arguments = ImagesArgs;

    async fn pre_start(
        &self,
        _myself: ActorRef<ImagesMsg>,
        args: ImagesArgs,
    ) -> Result<Arc<ImagesArgs>, ActorProcessingErr> {
        Ok(Arc::new(args))
    }

    async fn handle(
        &self,
        _myself: ActorRef<ImagesMsg>,
        message: ImagesMsg,
        args: &mut Arc<ImagesArgs>,
    ) -> Result<(), ActorProcessingErr> {
        let args = Arc::clone(args);
        points::message(&message)?;
        match message {
            ImagesMsg::Import { input, wish, cancel, reply } => {
                work::spawn(reply, move || work::import(&args, input, &wish, &cancel));
            }
            ImagesMsg::Pull { request, tell, cancel, reply } => {
                pull::spawn(args, request, tell, cancel, reply);
            }
            ImagesMsg::Remove { tag, reply } => {
                work::spawn(reply, move || work::remove(&args, &tag));
            }
            ImagesMsg::Tag { source, tag, reply } => {
                work::spawn(reply, move || work::tag(&args, &source, &tag));
            }
            ImagesMsg::Sweep { dry_run, reply } => {
                work::spawn(reply, move || Ok(work::sweep(&args, dry_run)));
            }
        }
        Ok(())
    }
}
