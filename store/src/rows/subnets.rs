//! The table `subnet_allocations`.
//!
//! # Invariants
//! * A VM has at most one subnet, an octet at most one VM: the table's own constraints.
//! * Looking which are held and taking one happen in the caller's one IMMEDIATE transaction, so no
//!   other process takes the same in between.

use std::collections::BTreeMap;

use jiff::Timestamp;
use matchlock_model::id::VmId;
use matchlock_model::subnet::{Ipv4Cidr, Subnet, SubnetPool};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{Reading, readable, stored};
use crate::error::WriteError;

/// The VM's subnet.
fn find(conn: &Connection, vm: VmId) -> rusqlite::Result<Option<Subnet>> {
    conn.prepare_cached("SELECT vm_id, octet, subnet FROM subnet_allocations WHERE vm_id = ?1")?
        .query_row([vm.to_string()], read)
        .optional()
}

/// Whether the VM has a subnet, readable or not.
pub(crate) fn is_held(conn: &Connection, vm: VmId) -> rusqlite::Result<bool> {
    conn.prepare_cached("SELECT EXISTS (SELECT 1 FROM subnet_allocations WHERE vm_id = ?1)")?
        .query_row([vm.to_string()], |row| row.get(0))
}

/// The VM's subnet, newly given if it has none.
pub(crate) fn allocate(
    conn: &Connection,
    vm: VmId,
    pool: &SubnetPool,
    avoid: &[Ipv4Cidr],
    at: Timestamp,
) -> Result<Subnet, WriteError> {
    if let Some(subnet) = find(conn, vm)? {
        return Ok(subnet);
    }
    // A row whose addresses cannot be read keeps its octet and with it that octet's subnet; it stops
    // nobody else.
    let held: BTreeMap<u32, Option<Ipv4Cidr>> = conn
        .prepare_cached("SELECT vm_id, octet, subnet FROM subnet_allocations")?
        .query_map([], |row| {
            let octet = Reading::new(row, "subnet_allocations", "vm_id")?.number("octet")?;
            Ok((octet, readable(read(row))?.map(|subnet| subnet.cidr)))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let subnet = pool.lowest_free(&held, avoid).ok_or_else(|| WriteError::NoFreeSubnet {
        pool: pool.to_string(),
        count: pool.count(),
        held: held.len(),
    })?;
    conn.prepare_cached(
        "INSERT INTO subnet_allocations (vm_id, octet, gateway_ip, guest_ip, subnet, created_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?
    .execute(params![
        vm.to_string(),
        subnet.octet,
        subnet.gateway().to_string(),
        subnet.guest().to_string(),
        subnet.cidr.to_string(),
        stored(at)
    ])?;
    Ok(subnet)
}

/// Takes the VM's subnet back; whether it had one.
pub(crate) fn release(conn: &Connection, vm: VmId) -> Result<bool, WriteError> {
    let rows = conn
        .prepare_cached("DELETE FROM subnet_allocations WHERE vm_id = ?1")?
        .execute([vm.to_string()])?;
    Ok(rows > 0)
}

fn read(row: &Row<'_>) -> rusqlite::Result<Subnet> {
    let row = Reading::new(row, "subnet_allocations", "vm_id")?;
    let (octet, cidr) = (row.number("octet")?, row.parsed("subnet")?);
    Subnet::new(octet, cidr).ok_or_else(|| {
        row.bad("subnet", format_args!("{cidr} has no room for a gateway and a guest"))
    })
}
