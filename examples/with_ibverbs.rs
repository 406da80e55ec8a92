//! A program on the crate `ibverbs` that has its own context, protection domain and queue pair, and lets anypage register in
//! that domain: what it registers is then reached through the program's own queue pair.
//!
//! Anywhere: `cargo build --features verbs --example with_ibverbs`, then
//! `cargo run -- run -- target/debug/examples/with_ibverbs`.
//! In the laboratory: `tests/lab/vm --mtu 4500 -- target/debug/examples/with_ibverbs`.
//!
//! Exit status: 0 every byte was right, 1 something was not, 3 there is no RDMA device.

use anypage::mixed::{Kind, MixedMemory, file_word};
use hw_model::addr::RegionAddr;
use hw_model::hca::{Key, QpAddress, Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use hw_model::wire::{Gid, Psn, Qpn};
use mr::device::verbs::{Capability, VerbsCq, VerbsPd, VerbsQp};
use mr::{Region, RegisterOptions};
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use std::process::ExitCode;
use std::time::{Duration, Instant};

type Error = Box<dyn std::error::Error + Send + Sync>;

const PAGE: u32 = 4096;
const NO_DEVICE: u8 = 3;

/// The reader: a queue pair of anypage's at the other end of the program's.
struct Reader {
    qp: Arc<VerbsQp>,
    cq: Arc<VerbsCq>,
    here: Arc<OwnedMemory>,
    into: Arc<dyn Region>,
}

impl Reader {
    /// One page of what `remote` names.
    fn read(&self, remote: Remote) -> Result<(Status, Vec<u8>), Error> {
        let local = [Sge { key: self.into.key(), address: self.into.address(), length: PAGE }];
        self.qp.post_send(&SendRequest::read(1, &local, remote))?;
        let (start, mut ended) = (Instant::now(), Vec::new());
        while self.cq.poll(&mut ended, 1)? == 0 {
            if start.elapsed() > Duration::from_secs(30) {
                return Err("no completion came".into());
            }
            std::thread::yield_now();
        }
        let mut bytes = vec![0; PAGE as usize];
        self.here.read_at(0, &mut bytes)?;
        Ok((ended[0].status, bytes))
    }
}

fn check(what: &str, (status, bytes): (Status, Vec<u8>), expected: &[u8]) -> Result<(), Error> {
    if status != Status::Success || bytes[..expected.len()] != *expected {
        return Err(format!("{what}: {status:?}, and not the bytes that are there").into());
    }
    println!("{what}: the right bytes");
    Ok(())
}

/// One of the program's addresses as anypage has it.
fn gid(entry: &ibverbs::GidEntry) -> Gid {
    Gid(u128::from(entry.gid.subnet_prefix()) << 64 | u128::from(entry.gid.interface_id()))
}

fn run(context: ibverbs::Context) -> Result<(), Error> {
    // The program, as it was: all of this is the crate `ibverbs`. Its domain borrows its context; that lives for ever here, so
    // that the domain can be shared.
    let context: &'static ibverbs::Context = Box::leak(Box::new(context));
    let domain = Arc::new(context.alloc_pd()?);
    let queue = context.create_cq(16, 0)?;

    // The hand-over.
    let pd = VerbsPd::from_ibverbs(context, Arc::clone(&domain))?;
    let device = pd.device();
    println!("{}: handed over", device.name());

    // Memory of several kinds in one range, as one region in the program's own domain.
    let space = ProcessSpace::open(Options::default())?;
    let parts = [(Kind::File, 1 << 16), (Kind::Shared, 1 << 16), (Kind::Anonymous, 1 << 16)];
    let mixed = Arc::new(MixedMemory::new(&parts)?);
    let options = if device.capabilities().has(Capability::OnDemand) {
        RegisterOptions::on_demand()
    } else {
        RegisterOptions::pinned()
    };
    let region = pd.register(&mixed.user_range(Arc::clone(&space) as _), options)?;

    // The program's queue pair, and a reader's at the other end, in a domain of its own.
    let (others, cq) = (device.alloc_pd()?, device.create_cq(16)?);
    let qp = others.create_qp(&cq, 16)?;
    let reader = qp.endpoint();
    let address = context.gid_table().iter().find(|entry| gid(entry) == reader.gid);
    let address = address.ok_or("the program does not know the reader's address")?;
    let mut builder = domain.create_qp(&queue, &queue, ibverbs::ibv_qp_type::IBV_QPT_RC);
    builder.set_gid_index(address.gid_index).allow_remote_rw();
    let prepared = builder.build()?;
    qp.connect(QpAddress { gid: gid(address), qpn: Qpn(prepared.endpoint().num), psn: Psn::new(0) })?;
    let to = ibverbs::QueuePairEndpoint { num: reader.qpn.0, lid: 0, gid: Some(address.gid) };
    let _answering = prepared.handshake(to)?;

    let here = Arc::new(OwnedMemory::new(&space, PAGE.into())?);
    let into = others.register(&here.user_range(), RegisterOptions::pinned())?;
    let reader = Reader { qp, cq, here, into };
    let at = |offset| Remote { key: region.key(), address: region.address().offset(offset) };
    check("a file, through the program's queue pair", reader.read(at(0))?, &file_word(0).to_le_bytes())?;
    check("shared memory", reader.read(at(1 << 16))?, &[0; PAGE as usize])?;

    // What the program has registered itself is reached by the same queue pair, by the program's own key.
    let mut own = domain.allocate::<u8>(2 * PAGE as usize)?;
    own.fill(0x5a);
    let first = own.as_ptr().addr() as u64;
    let remote = Remote { key: Key(own.rkey().key), address: RegionAddr(first) };
    check("the program's own region", reader.read(remote)?, &[0x5a; PAGE as usize])?;

    // A region of another domain is not reached through it: this is the program's domain and no other.
    let elsewhere = others.register(&mixed.user_range(space), options)?;
    let (status, _) = reader.read(Remote { key: elsewhere.key(), address: elsewhere.address() })?;
    if status != Status::RemoteAccessError {
        return Err(format!("a region of another domain was not refused: {status:?}").into());
    }
    println!("a region of another domain: refused");
    Ok(())
}

fn main() -> ExitCode {
    let devices = match ibverbs::devices() {
        Ok(devices) if !devices.is_empty() => devices,
        _ => {
            println!("there is no RDMA device here; `anypage run -- with_ibverbs` brings one");
            return ExitCode::from(NO_DEVICE);
        }
    };
    let opened = devices.get(0).ok_or("no device").and_then(|device| device.open().map_err(|_| "no context"));
    match opened.map_err(Into::into).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("with_ibverbs: {error}");
            ExitCode::FAILURE
        }
    }
}
