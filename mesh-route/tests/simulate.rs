#![allow(clippy::unwrap_used, clippy::expect_used)]
use mesh_core::config::{CompileContext, Role};
use mesh_core::istio::{LoadOptions, SourceFile};
use mesh_route::simulate::{Input, Simulation};

#[test]
fn look() {
    let text = std::fs::read_to_string("../examples/config/simulate/outlier-detection.yaml").unwrap();
    let (simulation, found) = Simulation::load(Input {
        scenario: SourceFile::new("s.yaml", text),
        config: Vec::new(),
        mesh_config: None,
        context: CompileContext::new(Role::Sidecar),
        options: LoadOptions::default(),
        read: &|_| unreachable!(),
    });
    for found in &found {
        println!("{found}");
    }
    let simulation = simulation.unwrap();
    let t = std::time::SystemTime::now();
    println!("{}", simulation.run().unwrap());
    println!("{:?}", t.elapsed());
}
