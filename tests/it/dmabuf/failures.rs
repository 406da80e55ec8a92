//! The life of a buffer with every one of its steps failing in turn.

use super::*;
use crate::fail_nth::{Made, Row, sweep_over};
use anypage::machine::End;
use hw_model::fault_plan::Point;
use hw_model::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeSet;
use std::time::Duration;

const PAGES: u64 = 8;

#[test]
fn every_step_of_a_buffers_life_may_fail_and_leaves_nothing() {
    let mut visited = BTreeSet::new();
    for iommu in [true, false] {
        let plan = FaultPlan::new(0, Vec::new());
        let points = Points::with(&plan);
        let config = MachineConfig { iommu, points: points.clone(), ..MachineConfig::default() };
        let options =
            MigratingOptions { revokes: true, points: points.clone(), ..MigratingOptions::default() };
        let mut stand = Stand::new(PAGES, &config, options.clone());
        let memory = stand.import(ImportMode::Dynamic);
        let bed = stand.bed(&memory, RegisterOptions::on_demand());
        let (space, machine, gpu) = (&bed.space, &bed.machine, &stand.gpu);
        let bar = machine.bar.as_ref().expect("the GPU has one");
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let counts = || (Counts::of(machine, space), Held::of(gpu.buffer()));
        let run = |name, verb: &mut dyn FnMut() -> Result<Made, String>| -> Row {
            sweep_over(&plan, Duration::from_secs(20), counts, name, verb)
                .unwrap_or_else(|leak| panic!("{leak}"))
        };
        let register = |mode, options| {
            let attachment = gpu.buffer().attach(ImportOptions::new(mode)).map_err(|error| words(&error))?;
            let memory = attachment.user_range().expect("an exporter of ours");
            let region =
                Arc::clone(&bed.near.pd).register(&memory, options).map_err(|error| words(&error))?;
            Ok(Box::new(region) as Made)
        };
        let mut rows = vec![
            run("register a DMABUF, on demand", &mut || {
                register(ImportMode::Dynamic, RegisterOptions::on_demand())
            }),
            run("register a DMABUF, pinned", &mut || {
                register(ImportMode::PinnedRevocable, RegisterOptions::pinned())
            }),
        ];
        // Page by page there and back, with a region over it that follows. Wherever it fails, no byte is lost.
        let empty = || {
            gpu.migrate(0..PAGES, PagePlace::Peer).expect("nothing is injected");
            gpu.migrate(0..PAGES, PagePlace::System).expect("nothing is injected");
        };
        empty();
        let turn = AtomicU64::new(0);
        rows.push(run("move pages of a DMABUF", &mut || {
            let bytes = pattern(turn.fetch_add(1, Ordering::Relaxed), page_bytes(PAGES));
            gpu.write_at(0, &bytes).map_err(|error| words(&error))?;
            let there = gpu.migrate(1..PAGES - 1, PagePlace::Peer).map_err(|error| words(&error));
            let advised = bed.near.region.advise(0, page_bytes(PAGES), odp::fault::Want::Snapshot);
            let back = gpu.migrate(0..PAGES, PagePlace::System).map_err(|error| words(&error));
            let mut seen = vec![0; bytes.len()];
            gpu.read_at(0, &mut seen).expect("nothing is on its way any more");
            assert!(seen == bytes, "bytes were lost on a way that failed: {there:?}, {back:?}");
            // What came in goes again, so that counts can be compared; that does not fail.
            plan.disarm();
            empty();
            there.and(back)?;
            advised.map_err(|error| words(&error))?;
            Ok(Box::new(()) as Made)
        }));
        rows.push(run("a buffer, from export to deregistration after its revocation", &mut || {
            let fresh = export(space, bar, PAGES, options.clone())?;
            let options = ImportOptions::new(ImportMode::PinnedRevocable);
            let attachment = fresh.buffer().attach(options).map_err(|error| words(&error))?;
            let memory = attachment.user_range().expect("an exporter of ours");
            let end = End::new(&machine.far, &memory, RegisterOptions::pinned());
            let region = Arc::clone(&bed.near.pd).register(&memory, RegisterOptions::pinned());
            let refused = fresh.migrate(0..1, PagePlace::Peer).map_err(|error| words(&error));
            // Whatever failed before: this does not.
            fresh.buffer().revoke().expect("revocation cannot fail");
            let linked = region.as_ref().map_or(0, |region| region.report().linked);
            assert_eq!(linked, 0, "a page is linked after its buffer was revoked");
            drop(end.map_err(|error| words(&error))?);
            let region = region.map_err(|error| words(&error))?;
            match refused {
                Err(error) if error.contains("pinned by 2") => Ok(Box::new((region, fresh)) as Made),
                other => Err(format!("{other:?}")),
            }
        }));
        for Row { verb, points, injected, survived } in rows {
            let behind = if iommu { "behind an IOMMU" } else { "without an IOMMU" };
            assert!(injected > 0, "{verb} met no point");
            println!(
                "FAIL-NTH {verb} ({behind}): points {}, injected {injected}, survived {survived}, leaks 0",
                points.len()
            );
        }
        visited.extend(plan.visits().into_iter().map(|(point, _): (Point, u64)| point.name()));
    }
    for point in odp::space::dmabuf::points::ALL {
        assert!(visited.contains(point.name()), "no verb ever came to {point}: is it still in the code?");
    }
}
