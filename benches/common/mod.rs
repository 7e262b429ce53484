//! Rows to write, as the VMs of a host write them.

use std::path::Path;

use jiff::Timestamp;
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use matchlock_model::phase::Phase;
use matchlock_model::record::Resources;
use matchlock_store::{NewVm, WriteConn, WriteOp};

/// A VM with everything that a real one names.
pub(crate) fn insert(number: u32, home: &Path) -> WriteOp {
    let owner = ProcessIdentity {
        pid: 4_000_000,
        start_ticks: 123_456_789,
        boot_id: "11111111-2222-3333-4444-555555555555".into(),
    };
    let namespaces = Namespaces { net: "4:4026531840".into(), pid: "4:4026531836".into() };
    let dir = home.join("vms").join(VmId::new(number).to_string());
    let file = |name: &str| Some(dir.join(name).display().to_string());
    WriteOp::InsertVm {
        record: Box::new(NewVm {
            id: VmId::new(number),
            image: "busybox".into(),
            config_json: r#"{"image":"busybox","command":["sh","-c","true"],"cpus":1}"#.into(),
            owner: owner.clone(),
            namespaces: namespaces.clone(),
            ephemeral: false,
            backend: "qemu".into(),
            resources: Resources {
                state_dir: Some(dir.display().to_string()),
                rootfs_path: file("rootfs.ext4"),
                link_socket: file("link.sock"),
                qmp_socket: file("qmp.sock"),
                owner_socket: file("owner.sock"),
                owner: Some(owner),
                namespaces: Some(namespaces),
                ..Resources::default()
            },
            created_at: Timestamp::now(),
        }),
    }
}

/// A change that appends a row: the text is another one each time.
pub(crate) fn change(number: u32, phase: Phase, text: u64) -> WriteOp {
    WriteOp::SetPhase {
        vm: VmId::new(number),
        epoch: OwnerEpoch::FIRST,
        phase,
        last_error: Some(format!("change {text}")),
        backend: None,
        resources: None,
        cleanup: Vec::new(),
        at: Timestamp::now(),
    }
}

/// Writes these ops, each of which must succeed.
pub(crate) fn write(conn: &mut WriteConn, ops: Vec<WriteOp>) {
    for answer in conn.apply(ops) {
        answer.expect("a write of the benchmark's own");
    }
}
