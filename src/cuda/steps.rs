//! What a captured graph runs, step by step: the names of its kernels, and the time of each.
#![allow(unsafe_code)]

use super::error::{CudaError, Result, driver};
use super::graph::Graph;
use super::stream::{Event, Stream};
use cudarc::driver::{result, sys};
use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;
use std::ptr;

/// The oldest CUDA of a driver that tells kernels' names (`cuFuncGetName`).
const NAMES_SINCE: (u32, u32) = (12, 3);

/// The steps of `graph`, which was captured on `stream`, each after all that it waits for: of a kernel its name as the compiler wrote it,
/// else in brackets what the step does.
pub(crate) fn step_names(graph: &Graph, stream: &mut Stream) -> Result<Vec<String>> {
    let (major, minor) = stream.device().properties().driver_cuda;
    if (major, minor) < NAMES_SINCE {
        let dotted = |(major, minor): (u32, u32)| format!("{major}.{minor}");
        return Err(CudaError::DriverTooOld { found: dotted((major, minor)), needed: dotted(NAMES_SINCE) });
    }
    steps(graph, stream)?.into_iter().map(name).collect()
}

/// Microseconds of each step of `graph`, in the order of [`step_names`]: medians of `runs` runs, one step after the other, with an event
/// between them. `graph` itself is launched no more afterwards: the events become a part of it.
pub(crate) fn step_times(graph: Graph, stream: &mut Stream, runs: usize) -> Result<Vec<f64>> {
    let steps = steps(&graph, stream)?;
    let events = (0..=steps.len()).map(|_| stream.device().event()).collect::<Result<Vec<_>>>()?;
    let mut before = record(&graph, &[], &events[0])?;
    for (&step, event) in steps.iter().zip(&events[1..]) {
        wait(&graph, before, step)?;
        before = record(&graph, &[step], event)?;
    }
    let executable = Executable::of(&graph)?;
    let mut times = vec![Vec::with_capacity(runs); steps.len()];
    for _ in 0..runs.max(1) {
        stream.hold_keep(graph.keep());
        for event in &events {
            stream.hold_keep(event.keep());
        }
        // SAFETY: the executable lives until after `synchronize`, and what it refers to is held by the stream until then.
        unsafe { result::graph::launch(executable.0, stream.cu()) }.map_err(driver("launch a graph"))?;
        stream.synchronize()?;
        for (times, events) in times.iter_mut().zip(events.windows(2)) {
            times.push(f64::from(events[0].micros_until(&events[1])?));
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2] // at least one run
    };
    Ok(times.into_iter().map(median).collect())
}

/// What is launched.
struct Executable(sys::CUgraphExec);

impl Executable {
    fn of(graph: &Graph) -> Result<Self> {
        // SAFETY: the graph lives, and `&mut Stream` of its stream, which the caller has, keeps other threads from it.
        let executable = unsafe { result::graph::instantiate(graph.raw(), sys::CUgraphInstantiate_flags(0)) };
        executable.map(Self).map_err(driver("make a graph ready"))
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        // SAFETY: made by `of`, destroyed once. The driver lets a run that is under way come to its end.
        if let Err(error) = unsafe { result::graph::exec_destroy(self.0) } {
            log::warn!("{}", driver("destroy a graph")(error));
        }
    }
}

/// Adds a step that records `event` after `after`.
fn record(graph: &Graph, after: &[sys::CUgraphNode], event: &Event) -> Result<sys::CUgraphNode> {
    let mut node = ptr::null_mut();
    // SAFETY: `after` are steps of the graph, which lives, as does the event; the call writes one node.
    unsafe { sys::cuGraphAddEventRecordNode(&mut node, graph.raw(), after.as_ptr(), after.len(), event.raw()) }
        .result()
        .map_err(driver("add an event to a graph"))?;
    Ok(node)
}

/// Lets step `later` of the graph wait for `earlier`.
fn wait(graph: &Graph, earlier: sys::CUgraphNode, later: sys::CUgraphNode) -> Result<()> {
    // SAFETY: both are steps of the graph, which lives; the arrays have one entry each.
    unsafe { sys::cuGraphAddDependencies(graph.raw(), &earlier, &later, 1) }.result().map_err(driver("order a graph's steps"))
}

/// The graph's steps, each after all that it waits for.
fn steps(graph: &Graph, stream: &mut Stream) -> Result<Vec<sys::CUgraphNode>> {
    stream.check_graph("steps", graph)?;
    stream.device().bind()?;
    let nodes = nodes(graph.raw())?;
    let place = |node: &sys::CUgraphNode| nodes.iter().position(|other| other == node);
    let edges = edges(graph.raw())?;
    let edges: Vec<(usize, usize)> = edges.iter().filter_map(|(from, to)| Some((place(from)?, place(to)?))).collect();
    Ok(in_order(nodes.len(), &edges).into_iter().map(|place| nodes[place]).collect())
}

fn nodes(graph: sys::CUgraph) -> Result<Vec<sys::CUgraphNode>> {
    const DURING: &str = "list a graph's steps";
    let mut count = 0;
    // SAFETY: with no place for nodes the call writes their number alone. The graph lives, and its stream is borrowed mutably.
    unsafe { sys::cuGraphGetNodes(graph, ptr::null_mut(), &mut count) }.result().map_err(driver(DURING))?;
    let mut nodes = vec![ptr::null_mut(); count];
    // SAFETY: there is room for `count` nodes, and the call writes at most as many.
    unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }.result().map_err(driver(DURING))?;
    nodes.truncate(count);
    Ok(nodes)
}

fn edges(graph: sys::CUgraph) -> Result<Vec<(sys::CUgraphNode, sys::CUgraphNode)>> {
    const DURING: &str = "list what a graph's steps wait for";
    let (none, mut count) = (ptr::null_mut::<sys::CUgraphNode>(), 0);
    // SAFETY: with no place for edges the call writes their number alone. The graph lives, and its stream is borrowed mutably.
    unsafe { sys::cuGraphGetEdges_v2(graph, none, none, ptr::null_mut(), &mut count) }.result().map_err(driver(DURING))?;
    let (mut from, mut to) = (vec![ptr::null_mut(); count], vec![ptr::null_mut(); count]);
    let mut data = vec![sys::CUgraphEdgeData { from_port: 0, to_port: 0, type_: 0, reserved: [0; 5] }; count];
    // SAFETY: all three have room for `count` entries, and the call writes at most as many.
    unsafe { sys::cuGraphGetEdges_v2(graph, from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr(), &mut count) }
        .result()
        .map_err(driver(DURING))?;
    Ok(from.into_iter().zip(to).take(count).collect())
}

fn name(node: sys::CUgraphNode) -> Result<String> {
    use sys::CUgraphNodeType as Type;
    const DURING: &str = "read the name of a graph's step";
    // As a number: a newer driver may know types that the enum lacks.
    let mut kind = u32::MAX;
    // SAFETY: the node is its graph's; the call writes one value of an enum that is an unsigned int.
    unsafe { sys::cuGraphNodeGetType(node, ptr::from_mut(&mut kind).cast()) }.result().map_err(driver(DURING))?;
    if kind != Type::CU_GRAPH_NODE_TYPE_KERNEL as u32 {
        let known = [
            (Type::CU_GRAPH_NODE_TYPE_MEMCPY, "copy"),
            (Type::CU_GRAPH_NODE_TYPE_MEMSET, "fill"),
            (Type::CU_GRAPH_NODE_TYPE_HOST, "host"),
            (Type::CU_GRAPH_NODE_TYPE_GRAPH, "graph"),
            (Type::CU_GRAPH_NODE_TYPE_EMPTY, "nothing"),
        ];
        let known = known.into_iter().find(|(known, _)| *known as u32 == kind);
        return Ok(known.map_or_else(|| format!("[step of type {kind}]"), |(_, word)| format!("[{word}]")));
    }
    let mut parameters = MaybeUninit::<sys::CUDA_KERNEL_NODE_PARAMS>::zeroed();
    // SAFETY: the node is a kernel's, and the call fills the struct, of which zeros are a value too.
    let parameters = unsafe {
        sys::cuGraphKernelNodeGetParams_v2(node, parameters.as_mut_ptr()).result().map_err(driver(DURING))?;
        parameters.assume_init()
    };
    let mut name: *const c_char = ptr::null();
    // SAFETY: a kernel's node has a function or else a kernel, loaded as long as the graph lives; the call writes one pointer.
    unsafe {
        match parameters.func.is_null() {
            false => sys::cuFuncGetName(&mut name, parameters.func),
            true => sys::cuKernelGetName(&mut name, parameters.kern),
        }
    }
    .result()
    .map_err(driver(DURING))?;
    if name.is_null() {
        return Ok("[kernel without a name]".into());
    }
    // SAFETY: the driver's own string, which ends with a zero and lives as long as the kernel is loaded.
    Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
}

/// Places `0..count`, each after those with an edge to it, otherwise as they come. What stands in a circle, which no graph has, comes last.
fn in_order(count: usize, edges: &[(usize, usize)]) -> Vec<usize> {
    let mut waits = vec![0_usize; count];
    for &(_, to) in edges {
        waits[to] += 1;
    }
    let mut ready: std::collections::BTreeSet<usize> = (0..count).filter(|&place| waits[place] == 0).collect();
    let mut order = Vec::with_capacity(count);
    while let Some(place) = ready.pop_first() {
        order.push(place);
        for &(_, to) in edges.iter().filter(|(from, _)| *from == place) {
            waits[to] -= 1;
            if waits[to] == 0 {
                ready.insert(to);
            }
        }
    }
    order.extend((0..count).filter(|&place| waits[place] > 0));
    order
}

#[cfg(test)]
mod tests {
    use super::in_order;

    #[test]
    fn steps_come_after_what_they_wait_for() {
        assert_eq!(in_order(4, &[(3, 2), (2, 1), (1, 0)]), [3, 2, 1, 0]);
        // Two branches that meet: as they come, where either may be first.
        assert_eq!(in_order(5, &[(0, 3), (3, 4), (0, 1), (1, 2), (2, 4)]), [0, 1, 2, 3, 4]);
        assert_eq!(in_order(3, &[]), [0, 1, 2]);
        assert!(in_order(0, &[]).is_empty());
        // No graph has a circle; still every step is there once.
        assert_eq!(in_order(3, &[(1, 2), (2, 1)]), [0, 1, 2]);
    }
}
