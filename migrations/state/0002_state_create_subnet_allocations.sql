-- Which VM holds which subnet; an octet is held by one VM at a time.
CREATE TABLE subnet_allocations (
    vm_id TEXT PRIMARY KEY,
    octet INTEGER NOT NULL UNIQUE,
    gateway_ip TEXT NOT NULL,
    guest_ip TEXT NOT NULL,
    subnet TEXT NOT NULL,
    created_at TEXT NOT NULL
);
CREATE INDEX idx_subnet_allocations_octet ON subnet_allocations (octet);
