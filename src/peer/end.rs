//! One side: its link, its device, its memory and its queue pair.

use super::network::{Endpoint, Plan};
use super::{Args, PerfError, Via, setup};
use hw_model::addr::RegionAddr;
use hw_model::bus::{Bus, DeviceSpec};
use hw_model::hca::{
    Access, CompletionQueue, HcaConfig, Key, PathMtu, Psn, QpAddress, QpSpec, Qpn, QueuePair, Remote, Sge,
};
use hw_model::iommu::{Domain, DomainConfig};
use hw_model::link::{
    FaultyLink, Link, LossRates, LossRule, OpenShmError, OpenUdpError, PacketDirection, PacketKinds,
    PcapLink, ShmConfig, ShmLink, UdpConfig, UdpLink,
};
use hw_model::sync::Arc;
use hw_model::wire::gid_of;
use mr::device::model::{ModelConfig, ModelDevice};
use mr::{ProtectionDomain, Region, RegisterOptions};
use odp::space::AddressSpace;
use odp::space::process::{Options, OwnedMemory, ProcessSpace};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};

/// Payload of a full packet over shared memory, unless something else is asked for.
const SHARED_MTU: u32 = 16 << 10;
/// Bytes that a requester sends ahead of the acknowledgements.
const AHEAD: u32 = 512 << 10;
/// How often a request is sent again without progress, where packets are lost on purpose.
const PATIENT: u8 = 100;
/// Bytes of what an atomic works on.
pub const WORD: u64 = 8;
/// Bytes filled and compared at a time.
const BLOCK: usize = 64 << 10;

/// One side of the measurement.
pub struct End {
    pub device: Arc<ModelDevice>,
    pub qps: Vec<Arc<QueuePair>>,
    pub cq: Arc<CompletionQueue>,
    pub region: Arc<dyn Region>,
    memory: Arc<OwnedMemory>,
    address: IpAddr,
}

/// Opens a link at the address that is asked for, or at one that is free.
pub fn open(args: &Args, via: Via, own: IpAddr) -> Result<(IpAddr, Arc<dyn Link>), PerfError> {
    let what = |address| format!("cannot open a link at {address}");
    let asked = args.sides.address.or(args.sides.listen).or((!own.is_loopback()).then_some(own));
    if let Some(address) = asked {
        let link = link_at(address, via).map_err(|error| match error {
            Refused::Taken(error) | Refused::Other(error) => {
                PerfError::Setup { what: what(address), source: error }
            }
        })?;
        return Ok((address, link));
    }
    // On one host each device has a loopback address of its own; the first is every host's, and the second listens.
    for last in 3..=254 {
        let address = IpAddr::from(Ipv4Addr::new(127, 0, 0, last));
        match link_at(address, via) {
            Ok(link) => return Ok((address, link)),
            Err(Refused::Taken(_)) => {}
            Err(Refused::Other(source)) => return Err(PerfError::Setup { what: what(address), source }),
        }
    }
    Err(setup("no loopback address is free")(std::io::Error::from(std::io::ErrorKind::AddrInUse)))
}

enum Refused {
    Taken(Box<dyn std::error::Error + Send + Sync>),
    Other(Box<dyn std::error::Error + Send + Sync>),
}

fn link_at(address: IpAddr, via: Via) -> Result<Arc<dyn Link>, Refused> {
    match via {
        Via::Udp => match UdpLink::open(&UdpConfig::at(address)) {
            Ok(link) => Ok(Arc::new(link)),
            Err(error @ OpenUdpError::Bind { .. }) => Err(Refused::Taken(error.into())),
            Err(error) => Err(Refused::Other(error.into())),
        },
        Via::Shm => match ShmLink::open(&ShmConfig::at(address)) {
            Ok(link) => Ok(Arc::new(link)),
            Err(error @ OpenShmError::Taken { .. }) => Err(Refused::Taken(error.into())),
            Err(error) => Err(Refused::Other(error.into())),
        },
    }
}

/// Wraps a link in what the options ask for.
pub fn wrap(args: &Args, link: Arc<dyn Link>) -> Result<Arc<dyn Link>, PerfError> {
    let mut link = link;
    if args.sides.loss > 0.0 {
        let rates = LossRates { drop: (args.sides.loss * 10.0).round() as u32, ..LossRates::default() };
        let rule = |direction| LossRule { direction, kinds: PacketKinds::all(), rates };
        let rules = [rule(PacketDirection::Outgoing), rule(PacketDirection::Incoming)];
        link = Arc::new(FaultyLink::with_rules(link, rules, 1));
    }
    if let Some(path) = &args.sides.pcap {
        let what = || format!("cannot write {}", path.display());
        let file = File::create(path).map_err(setup(what()))?;
        link = Arc::new(PcapLink::new(link, file).map_err(setup(what()))?);
    }
    Ok(link)
}

/// The path MTU that is asked for, or the largest sensible one.
pub fn mtu(args: &Args, via: Via, link: &dyn Link) -> Result<u32, PerfError> {
    let max = link.max_payload();
    let largest = match via {
        Via::Udp => max as u32,
        Via::Shm => (max as u32).min(SHARED_MTU),
    };
    let mtu = args.sides.mtu.unwrap_or(largest);
    let fits = PathMtu::new(mtu).is_some() && mtu as usize <= max;
    if fits { Ok(mtu) } else { Err(PerfError::Mtu { mtu, max }) }
}

impl End {
    /// Builds the device with its region and queue pair.
    pub fn new(args: &Args, plan: &Plan, address: IpAddr, link: Arc<dyn Link>) -> Result<Self, PerfError> {
        let max = link.max_payload();
        let path_mtu = PathMtu::new(plan.mtu).filter(|mtu| mtu.bytes() as usize <= max);
        let path_mtu = path_mtu.ok_or(PerfError::Mtu { mtu: plan.mtu, max })?;
        let mut hca =
            HcaConfig { path_mtu, window_bytes: AHEAD, seed: seed(address), ..HcaConfig::default() };
        if args.sides.loss > 0.0 {
            hca.retry_count = PATIENT;
        }
        let space = ProcessSpace::open(Options::default()).map_err(setup("the memory of this process"))?;
        let bus = Bus::new(space.memory());
        let domain = Domain::new(DomainConfig::default()).map_err(setup("an IOMMU"))?;
        let port =
            bus.attach(DeviceSpec::new("perf").domain(&domain)).map_err(setup("a place on the bus"))?;
        let config = ModelConfig { hca, ..ModelConfig::default() };
        let device = ModelDevice::threaded("perf", port, link, config).map_err(setup("a device"))?;
        let pd = device.alloc_model_pd().map_err(setup("a protection domain"))?;
        let bytes = plan.bytes().next_multiple_of(4096);
        let memory = Arc::new(OwnedMemory::new(&space, bytes).map_err(setup("memory"))?);
        let options = if args.odp { RegisterOptions::on_demand() } else { RegisterOptions::pinned() };
        let options = options.with_access(options.access | Access::REMOTE_ATOMIC);
        let region = Arc::clone(&pd).register(&memory.user_range(), options).map_err(setup("the region"))?;
        let cq = device.hca().create_cq(2 * plan.depth * plan.qps).map_err(setup("a completion queue"))?;
        let spec = QpSpec {
            access: Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC,
            max_send_requests: plan.depth,
            max_recv_requests: plan.depth,
            ..QpSpec::new(pd.handle(), &cq)
        };
        let qps = (0..plan.qps).map(|_| device.hca().create_qp(&spec));
        let qps = qps.collect::<Result<_, _>>().map_err(setup("a queue pair"))?;
        Ok(Self { device, qps, cq, region, memory, address })
    }

    /// What the other side must know of this one.
    pub fn endpoint(&self) -> Endpoint {
        let of = |qp: &Arc<QueuePair>| (qp.address().qpn.0, qp.address().psn.get());
        let qps = self.qps.iter().map(of).collect();
        let (key, region) = (self.region.key().0, self.region.address().0);
        Endpoint { address: self.address, qps, key, region }
    }

    /// Connects each queue pair to one of the peer's.
    pub fn connect(&self, peer: &Endpoint) -> Result<(), PerfError> {
        if peer.qps.len() != self.qps.len() {
            return Err(PerfError::Peer { said: format!("it has {} queue pairs", peer.qps.len()) });
        }
        for (qp, (qpn, psn)) in self.qps.iter().zip(&peer.qps) {
            let (qpn, psn) = (Qpn(qpn & 0xff_ffff), Psn::new(*psn));
            let peer = QpAddress { gid: gid_of(peer.address), qpn, psn };
            qp.connect(peer).map_err(setup("a queue pair does not connect"))?;
        }
        Ok(())
    }

    /// The queue pair of a message.
    pub fn qp(&self, message: u64) -> &QueuePair {
        &self.qps[(message % self.qps.len() as u64) as usize]
    }

    /// The place of a message in the own region.
    pub fn place(&self, offset: u64, length: u32) -> Sge {
        Sge { key: self.region.key(), address: self.region.address().offset(offset), length }
    }

    /// Makes `bytes` bytes of the region what both sides know.
    pub fn fill(&self, bytes: u64) -> Result<(), PerfError> {
        blocks(bytes, |at, block| {
            self.memory.write_at(at, &pattern(at, block.len())).map_err(setup("the own memory"))
        })
    }

    /// How many of `bytes` bytes of the region are something else.
    pub fn wrong(&self, bytes: u64) -> Result<u64, PerfError> {
        let mut wrong = 0;
        blocks(bytes, |at, block| {
            self.memory.read_at(at, block).map_err(setup("the own memory"))?;
            let expected = pattern(at, block.len());
            wrong += block.iter().zip(&expected).filter(|(a, b)| a != b).count() as u64;
            Ok(())
        })?;
        Ok(wrong)
    }

    /// How many bytes of the words at the beginning of the region, one a place, are not what adding 1 to one after the other
    /// made of them, `added` times in all.
    pub fn wrong_sums(&self, places: u64, added: u64) -> Result<u64, PerfError> {
        let mut wrong = 0;
        for place in 0..places {
            let mut word = [0; WORD as usize];
            self.memory.read_at(place * WORD, &mut word).map_err(setup("the own memory"))?;
            let expected = (added / places + u64::from(place < added % places)).to_le_bytes();
            wrong += word.iter().zip(expected).filter(|(a, b)| **a != *b).count() as u64;
        }
        Ok(wrong)
    }
}

/// The place of a message in the region of the other side.
pub fn remote(peer: &Endpoint, offset: u64) -> Remote {
    Remote { key: Key(peer.key), address: RegionAddr(peer.region.wrapping_add(offset)) }
}

/// Keys and sequence numbers must not be those of the last run: its packets may still be on their way.
fn seed(address: IpAddr) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(address)
}

fn blocks(
    bytes: u64,
    mut each: impl FnMut(u64, &mut [u8]) -> Result<(), PerfError>,
) -> Result<(), PerfError> {
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(BLOCK as u64) as usize;
        each(at, &mut block[..length])?;
        at += length as u64;
    }
    Ok(())
}

/// Bytes that differ from place to place, and are never zero as fresh memory is.
fn pattern(from: u64, length: usize) -> Vec<u8> {
    (from..from + length as u64).map(|at| ((at * 31 + at / 251) % 255) as u8 + 1).collect()
}
