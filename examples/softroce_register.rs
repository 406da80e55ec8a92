//! An application registers memory over SoftRoCE: a buffer of its own and a mapped file, pinned and on demand, prefetched, and
//! on demand again after its pages were dropped; and a peer reads it.
//!
//! In the laboratory: `cargo build --features verbs --example softroce_register`, then
//! `tests/lab/vm --mtu 4500 -- target/debug/examples/softroce_register --device rxe0`.
//! Anywhere: `cargo run --example softroce_register -- --device model`.

use anypage::mixed::{Kind, MixedMemory};
use clap::Parser;
use hw_model::hca::{Completion, QpAddress, Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use mr::{Region, RegisterOptions};
use odp::fault::Want;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use odp::space::{Access, UserRange};
use std::time::{Duration, Instant};

type Error = Box<dyn std::error::Error + Send + Sync>;

const SIZE: u64 = 1 << 20;
/// Both ends connect to the same device, so one page of the reader's is enough to read through.
const PIECE: u32 = 4096;

/// Registers memory over a device, and has a peer read it.
#[derive(Parser)]
struct Arguments {
    /// `model`, or the name of an RDMA device, such as rxe0.
    #[arg(long, default_value = "model")]
    device: String,
}

/// As much of a device as is needed here: the same words for both kinds.
trait Ends {
    fn register(&self, memory: &UserRange, options: RegisterOptions) -> Result<Arc<dyn Region>, Error>;
    fn post(&self, request: &SendRequest<'_>) -> Result<(), Error>;
    fn poll(&self) -> Result<Option<Completion>, Error>;

    fn read(&self, into: &dyn Region, from: &dyn Region, offset: u64) -> Result<Status, Error> {
        let local = [Sge { key: into.key(), address: into.address(), length: PIECE }];
        let remote = Remote { key: from.key(), address: from.address().offset(offset) };
        self.post(&SendRequest::read(1, &local, remote))?;
        let start = Instant::now();
        loop {
            match self.poll()? {
                Some(ended) => return Ok(ended.status),
                None if start.elapsed() > Duration::from_secs(30) => return Err("no completion came".into()),
                None => std::thread::yield_now(),
            }
        }
    }
}

/// Two queue pairs of one domain, connected to each other.
struct Model {
    pd: Arc<dyn mr::ProtectionDomain>,
    ends: [Arc<dyn mr::QueuePair>; 2],
    cq: Arc<dyn mr::CompletionQueue>,
    _machine: anypage::machine::Machine,
}

impl Model {
    fn new(space: &Arc<ProcessSpace>) -> Result<Self, Error> {
        use mr::Device;
        use odp::space::AddressSpace;
        let config = anypage::machine::MachineConfig::default();
        let machine = anypage::machine::Machine::new(space.memory(), None, &config)?;
        let pd = Arc::clone(&machine.near).alloc_pd()?;
        let cq = Arc::clone(&machine.near).create_cq(16)?;
        let qp = || Arc::clone(&pd).create_qp(Arc::clone(&cq), 16);
        let ends = [qp()?, qp()?];
        connect(
            &ends[0].endpoint(),
            &ends[1].endpoint(),
            |to| Ok(ends[0].connect(to)?),
            |to| Ok(ends[1].connect(to)?),
        )?;
        Ok(Self { pd, ends, cq, _machine: machine })
    }
}

fn connect(
    one: &QpAddress,
    other: &QpAddress,
    first: impl FnOnce(QpAddress) -> Result<(), Error>,
    second: impl FnOnce(QpAddress) -> Result<(), Error>,
) -> Result<(), Error> {
    first(*other)?;
    second(*one)
}

impl Ends for Model {
    fn register(&self, memory: &UserRange, options: RegisterOptions) -> Result<Arc<dyn Region>, Error> {
        Ok(Arc::clone(&self.pd).register(memory, options)?)
    }
    fn post(&self, request: &SendRequest<'_>) -> Result<(), Error> {
        Ok(self.ends[0].post_send(request)?)
    }
    fn poll(&self) -> Result<Option<Completion>, Error> {
        let mut found = Vec::new();
        self.cq.poll(&mut found, 1)?;
        Ok(found.pop())
    }
}

#[cfg(feature = "verbs")]
mod real {
    use super::*;
    use mr::device::verbs::{Capability, VerbsCq, VerbsDevice, VerbsPd, VerbsQp};

    pub struct Verbs {
        pd: Arc<VerbsPd>,
        ends: [Arc<VerbsQp>; 2],
        cq: Arc<VerbsCq>,
    }

    impl Verbs {
        pub fn new(name: &str) -> Result<Self, Error> {
            let device = VerbsDevice::open(name)?;
            for capability in Capability::ALL {
                let has = if device.capabilities().has(capability) { "yes" } else { "no" };
                println!("{name}: {capability}: {has}");
            }
            let (pd, cq) = (device.alloc_pd()?, device.create_cq(16)?);
            let ends = [pd.create_qp(&cq, 16)?, pd.create_qp(&cq, 16)?];
            connect(
                &ends[0].endpoint(),
                &ends[1].endpoint(),
                |to| Ok(ends[0].connect(to)?),
                |to| Ok(ends[1].connect(to)?),
            )?;
            Ok(Self { pd, ends, cq })
        }
    }

    impl Ends for Verbs {
        fn register(&self, memory: &UserRange, options: RegisterOptions) -> Result<Arc<dyn Region>, Error> {
            Ok(self.pd.register(memory, options)?)
        }
        fn post(&self, request: &SendRequest<'_>) -> Result<(), Error> {
            Ok(self.ends[0].post_send(request)?)
        }
        fn poll(&self) -> Result<Option<Completion>, Error> {
            let mut found = Vec::new();
            self.cq.poll(&mut found, 1)?;
            Ok(found.pop())
        }
    }
}

fn open(device: &str, space: &Arc<ProcessSpace>) -> Result<Box<dyn Ends>, Error> {
    if device == "model" {
        return Ok(Box::new(Model::new(space)?));
    }
    #[cfg(feature = "verbs")]
    return Ok(Box::new(real::Verbs::new(device)?));
    #[cfg(not(feature = "verbs"))]
    Err(format!("{device} needs a build with --features verbs; --device model needs none").into())
}

fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    let space = ProcessSpace::open(Options::default())?;
    let ends = open(&arguments.device, &space)?;

    let here = Arc::new(OwnedMemory::new(&space, PIECE.into())?);
    let into = ends.register(&here.user_range(), RegisterOptions::pinned())?;
    let reads = |what: &str, region: &dyn Region, expected: &[u8]| -> Result<(), Error> {
        let status = ends.read(&*into, region, 0)?;
        let mut bytes = vec![0; expected.len()];
        here.read_at(0, &mut bytes)?;
        let right = if bytes == expected { "the right bytes" } else { "OTHER BYTES" };
        println!("{what}: {status:?}, {right}");
        if status != Status::Success || bytes != expected {
            return Err(format!("{what}: the peer did not read what is there").into());
        }
        Ok(())
    };

    // A buffer of our own, pinned: no unsafe block, since nobody else has it.
    let buffer = Arc::new(OwnedMemory::new(&space, SIZE)?);
    buffer.write_at(0, b"in a buffer of our own")?;
    let pinned = ends.register(&buffer.user_range(), RegisterOptions::pinned())?;
    reads("pinned buffer", &*pinned, b"in a buffer of our own")?;

    // The same buffer on demand: what is not there is brought in when the peer asks, or ahead of it.
    let demanded = ends.register(&buffer.user_range(), RegisterOptions::on_demand())?;
    demanded.advise(0, SIZE, Want::Fault(Access::Write))?;
    reads("on demand, prefetched", &*demanded, b"in a buffer of our own")?;
    drop(pinned);
    buffer.discard(0, SIZE)?;
    reads("on demand, after its pages were dropped", &*demanded, &[0; 22])?;

    // A file that is mapped. Nothing of it has been read yet.
    let file = Arc::new(MixedMemory::new(&[(Kind::File, SIZE)])?);
    let mapped = ends.register(&file.user_range(Arc::clone(&space) as _), RegisterOptions::on_demand())?;
    reads("mapped file, on demand", &*mapped, &anypage::mixed::file_word(0).to_le_bytes())?;
    Ok(())
}
