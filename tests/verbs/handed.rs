//! Objects of a program on the crate `ibverbs`.

use super::world::{Case, Error, PAGE, Pair, World, ensure};
use hw_model::sync::Arc;
use ibverbs::Context;
use mr::RegisterOptions;
use mr::device::verbs::{VerbsDevice, VerbsError, VerbsPd};
use odp::space::process::OwnedMemory;

pub const CASES: &[Case] = &[
    Case { name: "a context of the crate ibverbs is used and held", run: context },
    Case { name: "a domain of the crate ibverbs is used and held", run: domain },
    Case { name: "a domain that is lent is given back", run: lent },
    Case { name: "a domain of another context is refused", run: foreign },
];

fn open(world: &World) -> Result<Context, Error> {
    let devices = ibverbs::devices()?;
    let named = devices
        .iter()
        .find(|device| device.name().is_some_and(|name| name.to_bytes() == world.device.name().as_bytes()));
    Ok(named.ok_or("the crate does not know the device")?.open()?)
}

/// That a region in `pd` is reached.
fn works(world: &World, pd: &Arc<VerbsPd>) -> Result<(), Error> {
    let memory = Arc::new(OwnedMemory::new(&world.space, PAGE)?);
    memory.write_at(0, &[7; PAGE as usize])?;
    let region = pd.register(&memory.user_range(), RegisterOptions::pinned())?;
    let here = Arc::new(OwnedMemory::new(&world.space, PAGE)?);
    let into = pd.register(&here.user_range(), RegisterOptions::pinned())?;
    let pair = Pair::new(pd.device(), pd, pd)?;
    pair.read(&*into, &*region)?;
    let mut bytes = [0; PAGE as usize];
    here.read_at(0, &mut bytes)?;
    ensure(bytes == [7; PAGE as usize], "other bytes were read")
}

fn context(world: &World) -> Result<(), Error> {
    let context = Arc::new(open(world)?);
    let weak = Arc::downgrade(&context);
    let device = VerbsDevice::from_ibverbs(context)?;
    ensure(device.name() == world.device.name(), "another device")?;
    ensure(device.capabilities() == world.device.capabilities(), "another device's capabilities")?;
    let pd = device.alloc_pd()?;
    drop(device);
    works(world, &pd)?;
    ensure(weak.strong_count() == 1, "the context is not held, or twice")?;
    drop(pd);
    ensure(weak.strong_count() == 0, "the context is held for ever")
}

fn domain(world: &World) -> Result<(), Error> {
    // For ever, as the program that shares its domain has it.
    let context: &'static Context = Box::leak(Box::new(open(world)?));
    let domain = Arc::new(context.alloc_pd()?);
    let pd = VerbsPd::from_ibverbs(context, Arc::clone(&domain))?;
    works(world, &pd)?;
    // Its own objects are in the same domain: its region is reached by a queue pair that we make in it.
    let mut own = domain.allocate::<u8>(2 * PAGE as usize)?;
    own.fill(9);
    let pair = Pair::new(pd.device(), &pd, &pd)?;
    let here = Arc::new(OwnedMemory::new(&world.space, PAGE)?);
    let into = pd.register(&here.user_range(), RegisterOptions::pinned())?;
    let remote = hw_model::hca::Remote {
        key: hw_model::hca::Key(own.rkey().key),
        address: hw_model::addr::RegionAddr(own.as_ptr().addr() as u64),
    };
    pair.read_remote(&*into, remote)?;
    let mut bytes = [0; PAGE as usize];
    here.read_at(0, &mut bytes)?;
    ensure(bytes == [9; PAGE as usize], "the program's own region was not read")?;
    drop((pair, into, own));
    ensure(Arc::strong_count(&domain) > 1, "the domain is not held")?;
    drop(pd);
    ensure(Arc::strong_count(&domain) == 1, "the domain is held for ever")
}

fn lent(world: &World) -> Result<(), Error> {
    let context = Arc::new(open(world)?);
    let domain = context.alloc_pd()?;
    let lent: Arc<()> = Arc::new(());
    let pd = super::world::borrowed(&context, &domain, Arc::clone(&lent) as _)?;
    works(world, &pd)?;
    drop(pd);
    ensure(Arc::strong_count(&lent) == 1, "what keeps the domain is held for ever")?;
    // The crate panics if something of ours is left in it.
    drop(domain);
    drop(context);
    Ok(())
}

fn foreign(world: &World) -> Result<(), Error> {
    let (one, other): (&'static Context, &'static Context) =
        (Box::leak(Box::new(open(world)?)), Box::leak(Box::new(open(world)?)));
    let refused = VerbsPd::from_ibverbs(one, Arc::new(other.alloc_pd()?));
    ensure(matches!(refused, Err(VerbsError::Foreign { .. })), "a domain of another context was taken")
}
