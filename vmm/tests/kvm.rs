//! The real `isopod-vmm` with guests of a few hand-assembled instructions on a real vCPU. They run wherever `/dev/kvm` opens,
//! even where it cannot run Linux.

mod support;

use std::time::Duration;

use isopod_proto::ErrorKind;
use isopod_proto::vmm::control_reply::Reply;
use isopod_proto::vmm::control_request::Request;
use isopod_proto::vmm::vm_exit::Reason;
use isopod_proto::vmm::{Console, Info, Pause, Resume, Stop};
use support::{Guest, Vm, kvm_is_there};

/// `mov dx, port; mov al, value; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `jmp $`
const FOREVER: [u8; 2] = [0xeb, 0xfe];
const SERIAL: u16 = 0x3f8;
/// SLP_TYP 5, SLP_EN.
const POWER_OFF: u8 = 5 << 2 | 1 << 5;

fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(SERIAL, byte)).collect()
}

#[test]
fn kvm_power_off_ends_with_its_reason() {
    if !kvm_is_there() {
        return;
    }
    let mut vm = Vm::start(&Guest { code: out(0x600, POWER_OFF), ..Guest::default() });
    let exit = vm.exit();
    assert_eq!((exit.reason(), vm.status()), (Reason::GuestPowerOff, Some(10)), "{}", exit.message);
}

#[test]
fn kvm_what_a_crashed_guest_printed_is_in_its_exit_record() {
    if !kvm_is_there() {
        return;
    }
    // An I/O write to the reset register.
    let code = [print("last words"), out(0x602, 1)].concat();
    let mut vm = Vm::start(&Guest { code, ..Guest::default() });
    let exit = vm.exit();
    assert_eq!((exit.reason(), vm.status()), (Reason::GuestCrash, Some(11)), "{}", exit.message);
    assert_eq!(exit.console, b"last words");
}

#[test]
fn kvm_triple_fault_is_a_crash() {
    if !kvm_is_there() {
        return;
    }
    // ud2 without an interrupt descriptor table.
    let mut vm = Vm::start(&Guest { code: vec![0x0f, 0x0b], ..Guest::default() });
    let exit = vm.exit();
    assert_eq!(exit.reason(), Reason::GuestCrash, "{}", exit.message);
}

#[test]
fn kvm_the_host_bridge_is_read_through_the_ecam() {
    if !kvm_is_there() {
        return;
    }
    // The boot page tables map the first GiB. The fourth gets the same directory, with the page at 0xe0000000 in it; then
    // mov eax, [0xe0000000], and its four bytes are printed.
    let mut code = vec![
        0xb8, 0x83, 0x00, 0x00, 0xe0, // mov eax, 0xe0000083
        0x48, 0xa3, 0x00, 0xb8, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // mov [0xb800], rax
        0xb8, 0x03, 0xb0, 0x00, 0x00, // mov eax, 0xb003
        0x48, 0xa3, 0x18, 0xa0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // mov [0xa018], rax
        0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, // mov rax, cr3; mov cr3, rax
        0xbb, 0x00, 0x00, 0x00, 0xe0, // mov ebx, 0xe0000000
        0x8b, 0x03, // mov eax, [rbx]
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    ];
    for _ in 0..4 {
        code.extend([0xee, 0xc1, 0xe8, 0x08]); // out dx, al; shr eax, 8
    }
    code.extend(out(0x602, 1));
    let mut vm = Vm::start(&Guest { code, ..Guest::default() });
    let exit = vm.exit();
    assert_eq!(exit.console, [0x36, 0x1b, 0x08, 0x00], "{:?}: {}", exit.reason(), exit.message);
}

#[test]
fn kvm_a_running_guest_pauses_resumes_and_stops_when_told() {
    if !kvm_is_there() {
        return;
    }
    // Counts on the console for ever.
    let mut code = out(SERIAL, b'x');
    code.extend([0xeb, (0u8).wrapping_sub(code.len() as u8 + 2)]);
    let mut vm = Vm::start(&Guest { code, ..Guest::default() });
    let exits = |vm: &Vm| match vm.call(Request::Info(Info {})) {
        Reply::Info(info) => (info.paused, info.userspace_exits),
        other => panic!("{other:?}"),
    };
    vm.wait_until(|vm| exits(vm).1 > 10);
    vm.call(Request::Pause(Pause {}));
    let (paused, before) = exits(&vm);
    assert!(paused);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(exits(&vm), (true, before), "nothing runs while it is paused");
    vm.call(Request::Pause(Pause {}));
    vm.call(Request::Resume(Resume {}));
    vm.wait_until(|vm| exits(vm).1 > before + 10);
    match vm.call(Request::Console(Console {})) {
        Reply::Console(console) => assert!(console.bytes.iter().all(|byte| *byte == b'x') && !console.bytes.is_empty()),
        other => panic!("{other:?}"),
    }
    vm.call(Request::Stop(Stop {}));
    let exit = vm.exit();
    assert_eq!((exit.reason(), vm.status(), exit.console), (Reason::Stopped, Some(0), vec![]));
}

#[test]
fn kvm_a_guest_that_never_exits_stops_on_sigterm_with_all_its_vcpus() {
    if !kvm_is_there() {
        return;
    }
    let mut vm = Vm::start(&Guest { code: FOREVER.to_vec(), vcpus: 3, ..Guest::default() });
    vm.call(Request::Pause(Pause {}));
    vm.call(Request::Resume(Resume {}));
    vm.terminate();
    let exit = vm.exit();
    assert_eq!((exit.reason(), vm.status()), (Reason::Stopped, Some(0)), "{}", exit.message);
}

#[test]
fn kvm_a_vm_with_room_to_grow_says_so_and_pauses_with_vcpus_that_never_ran() {
    if !kvm_is_there() {
        return;
    }
    let guest = Guest { code: FOREVER.to_vec(), max_vcpus: 3, max_memory: 1 << 30, ..Guest::default() };
    let mut vm = Vm::start(&guest);
    let Reply::Info(info) = vm.call(Request::Info(Info {})) else { panic!("not what was asked for") };
    assert_eq!((info.vcpus, info.max_vcpus), (1, 3));
    assert_eq!((info.memory_bytes, info.max_memory_bytes), (32 << 20, 1 << 30));
    vm.call(Request::Pause(Pause {}));
    vm.call(Request::Resume(Resume {}));
    for good in [64 << 20, 1 << 30, 32 << 20] {
        assert_eq!(vm.resize_memory(good), Ok(()));
    }
    for bad in [0, (32 << 20) + 4096, (1 << 30) + (4 << 20), u64::MAX] {
        let (kind, message) = vm.resize_memory(bad).expect_err("it cannot be");
        assert_eq!(kind, ErrorKind::InvalidArgument.code(), "{message}");
        assert!(message.contains(&bad.to_string()), "{message}");
    }
    vm.call(Request::Stop(Stop {}));
    assert_eq!(vm.exit().reason(), Reason::Stopped);
}

#[test]
fn kvm_memory_that_is_only_reserved_is_not_there() {
    if !kvm_is_there() {
        return;
    }
    // mov rax, 4 GiB as a large page; mov [the last entry of the page directory], rax
    let mut code = vec![0x48, 0xb8, 0x83, 0, 0, 0, 1, 0, 0, 0];
    code.extend([0x48, 0x89, 0x04, 0x25, 0xf8, 0xbf, 0, 0]);
    // mov byte [what that maps], 'A'; mov al, [there]; mov dx, SERIAL; out dx, al
    code.extend([0xc6, 0x04, 0x25, 0, 0, 0xe0, 0x3f, b'A']);
    code.extend([0x8a, 0x04, 0x25, 0, 0, 0xe0, 0x3f]);
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]);
    code.extend(out(0x600, POWER_OFF));
    let mut vm = Vm::start(&Guest { code, max_memory: 1 << 30, ..Guest::default() });
    let exit = vm.exit();
    match exit.reason() {
        Reason::GuestCrash => assert!(exit.message.contains("has not been given"), "{}", exit.message),
        // A KVM that emulates the instructions of such a guest takes it for a device's register, which nobody has.
        reason => {
            assert_eq!((reason, exit.console.contains(&b'A')), (Reason::GuestPowerOff, false), "{:?}", exit.console)
        }
    }
}

#[test]
fn kvm_disks_come_and_go_while_it_runs() {
    if !kvm_is_there() {
        return;
    }
    let vm = Vm::start(&Guest { code: FOREVER.to_vec(), ..Guest::default() });
    let ids = |vm: &Vm| match vm.call(Request::Info(Info {})) {
        Reply::Info(info) => info.disk_ids,
        other => panic!("{other:?}"),
    };
    vm.add_disk("img-1", &[(0, 0, 4096)], 1).expect("added");
    vm.add_disk("img-2", &[(1, 0, 512), (0, 512, 512)], 2).expect("added");
    assert_eq!(ids(&vm), ["img-1", "img-2"]);
    let (kind, message) = vm.add_disk("img-1", &[(0, 0, 512)], 1).expect_err("it is there already");
    assert_eq!((kind, message.contains("img-1")), (6, true), "{message}");
    let (kind, message) = vm.add_disk("img-3", &[(1, 0, 512)], 1).expect_err("no second descriptor");
    assert_eq!(kind, 3, "{message}");
    let (kind, message) = vm.add_file_system("files").expect_err("a file is no socket");
    assert_eq!(kind, 3, "{message}");
    vm.remove_disk("img-1").expect("removed");
    assert_eq!(vm.remove_disk("img-1").expect_err("it is gone").0, 5);
    assert_eq!(ids(&vm), ["img-2"]);
    // 127 places, less those of img-2, the entropy device, the balloon and the vsock device.
    for index in 0..123 {
        vm.add_disk(&format!("more-{index}"), &[(0, 0, 512)], 1).unwrap_or_else(|error| panic!("{index}: {error:?}"));
    }
    assert_eq!(vm.add_disk("one-too-many", &[(0, 0, 512)], 1).expect_err("the bus is full").0, 8);
}

#[test]
fn kvm_a_kernel_that_is_none_is_a_bad_configuration() {
    if !kvm_is_there() {
        return;
    }
    let mut vm = Vm::start(&Guest { kernel: Some(b"#!/bin/sh\n".to_vec()), ..Guest::default() });
    let exit = vm.exit();
    assert_eq!((exit.reason(), vm.status()), (Reason::BadConfig, Some(12)));
    assert!(
        exit.message.contains("the kernel cannot be loaded: it is not an uncompressed x86-64 ELF kernel"),
        "{}",
        exit.message
    );
}

#[test]
fn kvm_all_mistakes_of_a_configuration_are_in_the_exit_record() {
    let mut vm = Vm::start(&Guest { vcpus: 0, memory: 12345, ..Guest::default() });
    let exit = vm.exit();
    assert_eq!(exit.reason(), Reason::BadConfig);
    assert!(exit.message.contains("vcpus") && exit.message.contains("memory_bytes"), "{}", exit.message);
}
