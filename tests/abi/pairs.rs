//! Two processes, both ends of a connection, unmodified programs.

use super::{has, text};
use std::fs;
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// A port that nobody has at this moment.
fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port().to_string()
}

fn start(options: &[&str], program: &[&str]) -> Child {
    // A side that waits for a peer that is gone is a failure, not a hang.
    let mut command = Command::new("timeout");
    command.args(["120", env!("CARGO_BIN_EXE_anypage"), "run"]).args(options).arg("--").args(program);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("the binary runs")
}

/// Runs a server and a client of one program: what the client said, then the server.
fn pair(server_options: &[&str], client_options: &[&str], program: &[&str]) -> (Output, Output) {
    let port = free_port();
    let server = start(server_options, &[program, &["-p", port.as_str()]].concat());
    // Whether somebody listens there is looked up, not tried: a try would be taken for the client.
    let listening = format!(":{:04X} ", port.parse::<u16>().expect("a number"));
    for _ in 0..600 {
        let tables =
            ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
        let listens = |line: &str| line.contains(&listening) && line.contains(" 0A ");
        if tables.iter().any(|table| table.lines().any(listens)) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let client = start(client_options, &[program, &["-p", port.as_str(), "127.0.0.1"]].concat());
    let client = client.wait_with_output().expect("the client ends");
    (client, server.wait_with_output().expect("the server ends"))
}

fn both(outputs: &(Output, Output)) -> String {
    [&outputs.0, &outputs.1].map(|output| text(&output.stdout) + &text(&output.stderr)).join("\n")
}

#[test]
fn a_ping_pong_over_on_demand_memory_ends_well_on_both_sides() {
    if !has("a_ping_pong_over_on_demand_memory_ends_well_on_both_sides", "ibv_rc_pingpong", "ibverbs-utils") {
        return;
    }
    let outputs = pair(&[], &[], &["ibv_rc_pingpong", "-g", "0", "-o", "-c", "-n", "50"]);
    assert!(outputs.0.status.success() && outputs.1.status.success(), "{}", both(&outputs));
}

/// What nobody could do before, in one test: bytes between two processes, and a page fault that fails when the plan says.
#[test]
fn the_seventh_page_fault_of_ib_write_bw_fails_and_the_client_sees_the_right_status() {
    let name = "the_seventh_page_fault_of_ib_write_bw_fails_and_the_client_sees_the_right_status";
    if !has(name, "ib_write_bw", "perftest") {
        return;
    }
    // Eight queue pairs write to a buffer each, none of whose pages is mapped: eight page faults of the server.
    let program = ["ib_write_bw", "--odp", "-F", "-n", "10", "-s", "65536", "-q", "8"];
    let outputs = pair(&["--cold"], &["--cold"], &program);
    assert!(outputs.0.status.success() && outputs.1.status.success(), "{}", both(&outputs));

    let folder = tempfile::tempdir().expect("a folder");
    let plan = folder.path().join("plan.toml");
    let rule = "[[rule]]\npoint = \"mr.page_fault\"\ndirection = \"receive\"\nskip = 6\ntimes = 1\n";
    fs::write(&plan, rule).expect("a file");
    let options = ["--cold", "--plan", plan.to_str().expect("a name in UTF-8")];
    let outputs = pair(&options, &["--cold"], &program);
    // 10 is IBV_WC_REM_ACCESS_ERR.
    let client = text(&outputs.0.stdout) + &text(&outputs.0.stderr);
    assert!(client.contains("Failed status 10"), "{}", both(&outputs));
    assert!(!outputs.0.status.success());
    let said = text(&outputs.1.stderr);
    assert!(said.contains("rule 1 (line 1, mr.page_fault) fired 1 times"), "{said}");
}
