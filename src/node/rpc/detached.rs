//! What a session knows of VMs that have an owner of their own: what their rows and locks say.
//!
//! # Invariants
//! 1. Nothing is written, and nobody is asked: an owner that hangs holds up nobody.
//! 2. Row and lock are two looks. Whoever finds no owner reads the row again, which then says how the
//!    VM ended.
//! 3. What could not be looked at has not ended.

use std::time::Duration;

use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::record::VmRecord;
use serde_json::{Value, json};

use super::protocol::{Code, RpcError};
use super::session::Session;
use super::vms::{SessionVm, told};

/// How often a VM that is waited for is looked at.
const POLL: Duration = Duration::from_millis(200);

/// What is there of a detached VM.
#[derive(Debug)]
pub(super) struct Sight {
    /// Its row; `None` once it is removed.
    record: Option<VmRecord>,
    /// Nobody owns it.
    pub(super) has_ended: bool,
}

fn unseen(error: &(dyn std::error::Error + 'static)) -> RpcError {
    let failure = Failure::from_error(FailureKind::Host, error);
    RpcError::failure(Code::Vm, &failure.context("could not look at the detached VM"))
}

/// Looks at it.
///
/// # Errors
/// When that cannot be done.
pub(super) async fn look(session: &Session, id: VmId) -> Result<Sight, RpcError> {
    let deps = &session.host.deps;
    let row = async || deps.reader.vm(id).await.map_err(|e| unseen(&e));
    let record = row().await?;
    let is_over = record.as_ref().is_none_or(|record| record.phase == Phase::Cleaned);
    if is_over || deps.locks.is_held(id).map_err(|e| unseen(&e))? {
        return Ok(Sight { record, has_ended: is_over });
    }
    Ok(Sight { record: row().await?, has_ended: true })
}

impl Sight {
    /// As the other VMs are told; what only its owner knows is null.
    fn told(&self, id: VmId) -> Value {
        let record = self.record.as_ref();
        let cause = record.map(|record| &record.last_error).filter(|text| !text.is_empty());
        json!({
            "id": id,
            "phase": record.map(|record| record.phase),
            "generation": null,
            "ended": self.has_ended,
            "cleaned_up": record.is_none_or(|record| record.phase == Phase::Cleaned),
            "cause": cause,
        })
    }
}

/// A VM of the session, as it is listed.
///
/// # Errors
/// When it cannot be looked at.
pub(super) async fn shown(
    session: &Session,
    vm: &SessionVm,
    is_first: bool,
) -> Result<Value, RpcError> {
    let (mut value, image, is_detached) = match vm {
        SessionVm::Own { handle, image, .. } => (told(&handle.view.borrow()), image, false),
        SessionVm::Detached { id, image } => (look(session, *id).await?.told(*id), image, true),
    };
    value["image"] = json!(&**image);
    value["default"] = json!(is_first);
    value["detached"] = json!(is_detached);
    Ok(value)
}

/// Waits until nobody owns it any more; how it is told then.
///
/// # Errors
/// When it cannot be looked at.
pub(super) async fn wait(session: &Session, id: VmId) -> Result<Value, RpcError> {
    loop {
        let sight = look(session, id).await?;
        if sight.has_ended {
            return Ok(sight.told(id));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// What a VM whose owner cannot be reached is refused with.
pub(super) async fn why_gone(session: &Session, id: VmId) -> RpcError {
    let sight = match look(session, id).await {
        Ok(sight) => sight,
        Err(error) => return error,
    };
    let text = match sight.record {
        None => format!("VM {id} has ended, and was removed"),
        Some(_) if !sight.has_ended => format!("the owner of VM {id} does not listen"),
        Some(VmRecord { phase, last_error, .. }) if last_error.is_empty() => {
            format!("VM {id} has ended (phase {phase})")
        }
        Some(VmRecord { phase, last_error, .. }) => {
            format!("VM {id} has ended (phase {phase}): {last_error}")
        }
    };
    RpcError::new(Code::Vm, text)
}
