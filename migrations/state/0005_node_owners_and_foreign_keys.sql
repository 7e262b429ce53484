-- Who may write a VM's rows, and which processes and namespaces are the VM's. A table beside vms,
-- so that statements written for the columns of vms alone go on working. A VM without a row here
-- has epoch 0 and no known owner.
CREATE TABLE vm_nodes (
    vm_id TEXT PRIMARY KEY REFERENCES vms (id) ON DELETE CASCADE,
    owner_epoch INTEGER NOT NULL,
    owner_json TEXT,
    hypervisor_json TEXT,
    namespaces_json TEXT,
    ephemeral INTEGER NOT NULL DEFAULT 0 CHECK (ephemeral IN (0, 1))
);

-- A subnet whose VM has no row may still have its TAP on the host. It must not return to the pool
-- unseen: give it a VM to clean up.
INSERT INTO vms (id, pid, status, image, config_json, created_at, updated_at)
SELECT vm_id, 0, 'crashed', '', NULL, created_at, created_at
FROM subnet_allocations
WHERE NOT EXISTS (SELECT 1 FROM vms WHERE vms.id = subnet_allocations.vm_id);

-- SQLite cannot add a foreign key to a table: make it anew, the same but for the key.
ALTER TABLE subnet_allocations RENAME TO subnet_allocations_without_key;
CREATE TABLE subnet_allocations (
    vm_id TEXT PRIMARY KEY REFERENCES vms (id) ON DELETE RESTRICT,
    octet INTEGER NOT NULL UNIQUE,
    gateway_ip TEXT NOT NULL,
    guest_ip TEXT NOT NULL,
    subnet TEXT NOT NULL,
    created_at TEXT NOT NULL
);
INSERT INTO subnet_allocations (vm_id, octet, gateway_ip, guest_ip, subnet, created_at)
SELECT vm_id, octet, gateway_ip, guest_ip, subnet, created_at
FROM subnet_allocations_without_key;
DROP TABLE subnet_allocations_without_key;
CREATE INDEX idx_subnet_allocations_octet ON subnet_allocations (octet);
