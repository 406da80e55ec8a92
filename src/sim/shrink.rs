//! Shorter traces that break in the same way: delta debugging over steps (Zeller and Hildebrandt, TSE 2002).

use super::choices::Trace;

/// Leaves out steps for as long as `breaks` says that what is left still breaks, trying at most `tries` times. Gives what
/// is left, and how often it tried.
pub fn shrink(trace: Trace, tries: usize, mut breaks: impl FnMut(&Trace) -> bool) -> (Trace, usize) {
    let mut best = trace;
    let mut tried = 0;
    let mut chunk = best.steps.len().div_ceil(2).max(1);
    loop {
        let mut start = 0;
        let mut cut_any = false;
        while start < best.steps.len() && tried < tries {
            let end = (start + chunk).min(best.steps.len());
            let mut shorter = best.clone();
            shorter.steps.drain(start..end);
            tried += 1;
            if breaks(&shorter) {
                best = shorter;
                cut_any = true;
            } else {
                start = end;
            }
        }
        if tried >= tries || chunk == 1 && !cut_any {
            return (best, tried);
        }
        if !cut_any || chunk > 1 {
            chunk = (chunk / 2).max(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_steps_that_matter_are_all_that_is_left() {
        let trace = Trace { setup: vec![1], steps: (0..1000).map(|n| vec![n]).collect() };
        let matter = |trace: &Trace| [7, 900].iter().all(|n| trace.steps.contains(&vec![*n]));
        let (short, tried) = shrink(trace, 1000, matter);
        assert_eq!(short.steps, [[7], [900]], "after {tried} tries");
    }

    #[test]
    fn it_ends_when_it_has_tried_enough() {
        let trace = Trace { setup: Vec::new(), steps: vec![vec![0]; 100] };
        assert_eq!(shrink(trace, 5, |_| false).1, 5);
    }
}
