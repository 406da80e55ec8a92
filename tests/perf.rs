//! `anypage perf` in two processes: what is measured has arrived, and every byte of it is right.

use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A loopback address and a TCP port that no other test uses at the moment, as far as one can tell.
fn place() -> (String, String) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id().wrapping_mul(17) + NEXT.fetch_add(1, Ordering::Relaxed);
    let address = format!("127.{}.{}.{}", 20 + number / 62_500 % 200, number / 250 % 250, 2 + number % 250);
    (address, (20_000 + number % 12_000).to_string())
}

fn perf(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anypage"));
    command.arg("perf").args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs both sides; gives what the one that listens and the one that connects said.
fn run(listen: &[&str], connect: &[&str]) -> [Output; 2] {
    let (address, port) = place();
    let far: Child =
        perf(&[&["--listen", &address, "--port", &port], listen].concat()).spawn().expect("it starts");
    let connecting = perf(&[&["--connect", &address, "--port", &port], connect].concat()).output();
    [far.wait_with_output().expect("it ends"), connecting.expect("it ends")]
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn every_operation_arrives_over_either_link_and_every_byte_is_right() {
    for via in ["udp", "shm"] {
        for operation in ["write", "read", "send"] {
            let arguments = [operation, "--via", via, "--iterations", "200", "--size", "20000", "--odp"];
            let said = run(&["--odp"], &arguments);
            for output in &said {
                assert!(output.status.success(), "{operation} over {via}: {}", text(output));
                assert!(text(output).contains("320000 bytes verified, 0 wrong"), "{}", text(output));
            }
            assert!(text(&said[1]).contains("MB/s"), "{}", text(&said[1]));
        }
    }
}

#[test]
fn atomics_over_several_queue_pairs_add_up_and_are_reported_as_json() {
    for via in ["udp", "shm"] {
        let arguments =
            ["atomic", "--via", via, "--iterations", "1000", "--qps", "3", "--depth", "4", "--json"];
        let said = run(&["--json"], &arguments);
        for output in &said {
            assert!(output.status.success(), "{via}: {}", text(output));
            let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
            assert_eq!(found["operation"], "atomic");
            assert_eq!((&found["qps"], &found["depth"]), (&3.into(), &4.into()));
            // 12 words, of which each was added to 83 or 84 times.
            assert_eq!((&found["verified_bytes"], &found["wrong_bytes"]), (&96.into(), &0.into()), "{found}");
            assert!(
                found["link"][format!("{via}_received")].as_u64().is_some_and(|count| count >= 1000),
                "{found}"
            );
        }
        let found: serde_json::Value = serde_json::from_slice(&said[1].stdout).expect("JSON");
        let latency = &found["measured"]["latency"];
        assert!(
            latency["p50_ns"].as_u64() > Some(0) && latency["p50_ns"].as_u64() <= latency["p99_ns"].as_u64()
        );
    }
}

#[test]
fn a_lossy_way_is_survived_and_written_down() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_str().expect("a name");
    let arguments =
        ["write", "--iterations", "100", "--size", "64K", "--loss", "2", "--mtu", "1024", "--pcap", path];
    let said = run(&[], &arguments);
    assert!(said.iter().all(|output| output.status.success()), "{} {}", text(&said[0]), text(&said[1]));
    assert!(!text(&said[1]).contains(" 0 times sent again"), "2 % of 6400 packets: {}", text(&said[1]));
    // Each of 6400 packets of a kibibyte, and more.
    assert!(file.as_file().metadata().expect("its size").len() > 6_400 * 1_100);
}

#[test]
fn what_cannot_be_is_refused_with_a_word_of_why() {
    let fails = |arguments: &[&str], code: i32, word: &str| {
        let output = perf(arguments).output().expect("it ends");
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output));
        assert!(text(&output).contains(word), "{arguments:?}: {}", text(&output));
    };
    fails(&["write", "--loss", "1"], 2, "--listen");
    fails(&["atomic", "--connect", "127.0.0.2", "--size", "16"], 2, "8 bytes");
    fails(&["write", "--connect", "127.0.0.2", "--qps", "257"], 2, "--qps");
    fails(&["--listen", "--connect", "127.0.0.1"], 2, "cannot be used with");
    fails(&["write", "--connect", "127.0.0.2", "--size", "65M"], 2, "67108864");
    // Neither ignored nor taken for what is said when nothing is.
    fails(&["write", "--connect", "127.0.0.2", "--duration", "5"], 2, "--duration");
    fails(&["atomic", "--size", "64K"], 2, "8 bytes");
    fails(&["write", "--duration", "0"], 2, "above 0");
    fails(&["write", "--connect", "127.0.0.2", "--loss", "51"], 2, "--loss");
    fails(&["--listen", "192.0.2.1"], 3, "192.0.2.1");
    let (address, port) = place();
    let far = perf(&["--listen", &address, "--port", &port]).spawn().expect("it starts");
    fails(&["write", "--connect", &address, "--port", &port, "--mtu", "1000"], 2, "power of two");
    let far = far.wait_with_output().expect("it ends");
    assert_eq!(far.status.code(), Some(3), "the other side has gone: {}", text(&far));
}
