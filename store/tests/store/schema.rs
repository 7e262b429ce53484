//! The tables as operators and the reference know them.

use std::path::Path;

use matchlock_model::phase::Phase;
use matchlock_store::{IMAGES_DB, open_images};
use rusqlite::Connection;

use crate::support::{Home, apply_one, insert, set_phase, vm};

fn schema(conn: &Connection) -> String {
    let mut query = conn
        .prepare("SELECT type, name, coalesce(sql, '-') FROM sqlite_schema ORDER BY tbl_name, type DESC, name")
        .unwrap();
    let lines = query
        .query_map([], |row| {
            let (kind, name, sql): (String, String, String) =
                (row.get(0)?, row.get(1)?, row.get(2)?);
            let words: Vec<_> = sql.split_whitespace().collect();
            Ok(format!("{kind} {name}\n    {}\n", words.join(" ")))
        })
        .unwrap();
    lines.map(Result::unwrap).collect()
}

fn applied(conn: &Connection) -> Vec<(String, i64, String)> {
    let mut query = conn
        .prepare("SELECT module, version, name FROM schema_migrations ORDER BY module, version")
        .unwrap();
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
    rows.unwrap().map(Result::unwrap).collect()
}

fn named(list: &[(&str, i64, &str)]) -> Vec<(String, i64, String)> {
    list.iter()
        .map(|(module, version, name)| ((*module).to_owned(), *version, (*name).to_owned()))
        .collect()
}

#[test]
fn the_schema_of_the_state_is_as_recorded() {
    let home = Home::new();
    let _writer = home.writer();
    assert_eq!(schema(&home.plain()), include_str!("snapshots/state.schema.txt"));
    assert_eq!(
        applied(&home.plain()),
        named(&[
            ("lifecycle", 1, "create_append_only_vm_lifecycle_table"),
            ("lifecycle", 2, "create_vm_lifecycle_head"),
            ("node", 1, "owners_and_foreign_keys"),
            ("node", 2, "removal_intent"),
            ("node", 3, "exit_code"),
            ("state", 1, "create_vms"),
            ("state", 2, "create_subnet_allocations"),
        ])
    );
}

#[test]
fn the_schema_of_the_images_is_as_recorded() {
    let dir = tempfile::TempDir::new().unwrap();
    let _images = open_images(dir.path()).unwrap();
    let conn = Connection::open(dir.path().join(IMAGES_DB)).unwrap();
    assert_eq!(schema(&conn), include_str!("snapshots/images.schema.txt"));
    assert_eq!(
        applied(&conn),
        named(&[("image", 1, "create_images"), ("image", 2, "create_image_layers_erofs_schema"),])
    );
}

#[test]
fn columns_and_keys_are_the_references() {
    let home = Home::new();
    let _writer = home.writer();
    let conn = home.plain();
    // name, type, NOT NULL, default, position in the primary key
    let columns = |table: &str| -> Vec<String> {
        let mut query = conn
            .prepare("SELECT name, type, \"notnull\", coalesce(dflt_value, '-'), pk FROM pragma_table_info(?1)")
            .unwrap();
        query
            .query_map([table], |row| {
                let (name, kind, default): (String, String, String) =
                    (row.get(0)?, row.get(1)?, row.get(3)?);
                let (not_null, pk): (i64, i64) = (row.get(2)?, row.get(4)?);
                Ok(format!("{name} {kind} {not_null} {default} {pk}"))
            })
            .unwrap()
            .map(Result::unwrap)
            .collect()
    };
    assert_eq!(
        columns("vms"),
        [
            "id TEXT 0 - 1",
            "pid INTEGER 1 0 0",
            "status TEXT 1 - 0",
            "image TEXT 1 '' 0",
            "config_json BLOB 0 - 0",
            "created_at TEXT 1 - 0",
            "updated_at TEXT 1 - 0"
        ]
    );
    assert_eq!(
        columns("subnet_allocations"),
        [
            "vm_id TEXT 0 - 1",
            "octet INTEGER 1 - 0",
            "gateway_ip TEXT 1 - 0",
            "guest_ip TEXT 1 - 0",
            "subnet TEXT 1 - 0",
            "created_at TEXT 1 - 0"
        ]
    );
    assert_eq!(
        columns("vm_lifecycle"),
        [
            "vm_id TEXT 1 - 1",
            "version INTEGER 1 - 2",
            "backend TEXT 1 '' 0",
            "phase TEXT 1 - 0",
            "updated_at TEXT 1 - 0",
            "last_error TEXT 1 '' 0",
            "resources_json TEXT 1 '{}' 0",
            "cleanup_json TEXT 1 '{}' 0"
        ]
    );
    assert_eq!(columns("vm_lifecycle_head"), ["vm_id TEXT 0 - 1", "last_version INTEGER 1 - 0"]);
    assert_eq!(
        columns("schema_migrations"),
        ["module TEXT 1 - 1", "version INTEGER 1 - 2", "name TEXT 1 - 0", "applied_at TEXT 1 - 0"]
    );
}

#[test]
fn a_vm_that_holds_a_subnet_cannot_lose_its_row() {
    let home = Home::new();
    apply_one(&mut home.writer(), insert(vm(1))).unwrap();
    let conn = home.plain();
    conn.execute_batch("PRAGMA foreign_keys = ON").unwrap();
    let sql = "INSERT INTO subnet_allocations VALUES (?1, ?2, 'g', 'v', 's', 't')";
    conn.execute(sql, ("vm-00000001", 100)).unwrap();
    assert!(conn.execute("DELETE FROM vms", []).is_err());
    assert!(conn.execute(sql, ("vm-00000002", 101)).is_err(), "no such VM");
    conn.execute("DELETE FROM subnet_allocations", []).unwrap();
    assert_eq!(conn.execute("DELETE FROM vms", []).unwrap(), 1);
    let nodes: i64 = conn.query_row("SELECT count(*) FROM vm_nodes", [], |row| row.get(0)).unwrap();
    assert_eq!(nodes, 0);
}

/// The statements of the runbook, word for word but for the id.
#[test]
fn what_the_runbook_tells_operators_to_type_works() {
    let home = Home::new();
    let mut writer = home.writer();
    apply_one(&mut writer, insert(vm(0xabc1_2345))).unwrap();
    apply_one(&mut writer, set_phase(vm(0xabc1_2345), Phase::Created)).unwrap();
    let conn = home.plain();
    conn.execute_batch(
        "INSERT INTO subnet_allocations
         VALUES ('vm-abc12345', 100, '192.168.100.1', '192.168.100.2', '192.168.100.0/24', 't')",
    )
    .unwrap();
    let state = [
        (
            r#"select vm_id,version,phase,updated_at,last_error from vm_lifecycle where vm_id="vm-abc12345" order by version;"#,
            "vm-abc12345|1|creating|2026-01-02T03:04:05Z|\nvm-abc12345|2|created|2026-01-02T03:04:05.01Z|\n",
        ),
        (
            r#"select version,cleanup_json from vm_lifecycle where vm_id="vm-abc12345" order by version;"#,
            "1|{}\n2|{}\n",
        ),
        ("select id,status,pid from vms;", "vm-abc12345|starting|4000\n"),
        (
            "select vm_id,octet,subnet from subnet_allocations;",
            "vm-abc12345|100|192.168.100.0/24\n",
        ),
    ];
    for (sql, expected) in state {
        assert_eq!(shown(&conn, sql), expected, "{sql}");
    }
    let images = home.path.join("images");
    drop(open_images(&images).unwrap());
    let conn = Connection::open(images.join(IMAGES_DB)).unwrap();
    assert_eq!(shown(&conn, "select scope,tag,digest,size from images;"), "");
}

/// The answer as the sqlite3 shell shows it.
fn shown(conn: &Connection, sql: &str) -> String {
    use rusqlite::types::ValueRef;
    let mut query = conn.prepare(sql).unwrap();
    let count = query.column_count();
    let rows = query.query_map([], |row| {
        let cells = (0..count).map(|i| match row.get_ref(i).unwrap() {
            ValueRef::Integer(number) => number.to_string(),
            ValueRef::Text(text) => String::from_utf8(text.to_vec()).unwrap(),
            other => panic!("{other:?}"),
        });
        Ok(cells.collect::<Vec<_>>().join("|") + "\n")
    });
    rows.unwrap().map(Result::unwrap).collect()
}

#[test]
fn each_migration_has_its_checksum_in_the_database() {
    let home = Home::new();
    let _writer = home.writer();
    let sums = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations/SHA256SUMS"),
    )
    .unwrap();
    let conn = home.plain();
    let mut query =
        conn.prepare("SELECT sha256 FROM schema_migrations NATURAL JOIN schema_checksums").unwrap();
    let recorded: Vec<String> =
        query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    assert_eq!(recorded.len(), 7);
    assert!(recorded.iter().all(|sum| sums.contains(sum.as_str())));
}
