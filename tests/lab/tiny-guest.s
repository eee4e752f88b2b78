# A guest of a few hundred bytes that writes, answers its power button and costs next to nothing: it sleeps between the
# ticks of the BIOS clock. QEMU starts it as a Linux kernel of the oldest kind, in real mode; disks are reached through
# the BIOS (INT 13h, https://en.wikipedia.org/wiki/INT_13H), the power button through the PIIX4's ACPI registers, which
# SeaBIOS puts at 0x600. What it says on the serial port: tests/lab/README.md.
#
#   as --32 -o tiny.o tiny-guest.s && objcopy -O binary tiny.o tiny.bin
#
# tiny_guest.py keeps the bytes from `start` on; its test assembles this file again, where there is an assembler.

.code16
.org 0x1f1
    .byte 1                     # sectors of the setup part, after the first one
.org 0x1fe
    .word 0xaa55
.org 0x200
start:
    jmp main
    .ascii "HdrS"
    .word 0x0202                # boot protocol
.org 0x268
main:
    movw %ds, packet+6
    movw $0x602, %dx            # ACPI: tell of the power button
    movw $0x100, %ax
    outw %ax, %dx
    sti
    movb $'b', %bl
find:
    movw $2047, packet+8
    movb $0x42, %ah
    call disk
    movl sector, %eax
    movl %eax, count
    movw $found, %si
    call tell
    decb %bl
    cmpb $'a', %bl
    jae find
    movw $ready, %si
    call print
wait:
    hlt                         # until the clock ticks, 18 times a second
    movw $0x600, %dx
    inw %dx, %ax
    testb $1, %ah
    jnz off
    cmpb $0, role
    je wait
    decb ticks
    jnz wait
    movb $4, ticks
    incl count
    movl count, %eax
    movw $sector, %di
    pushw %ds
    popw %es
    movw $128, %cx
    cld
    rep stosl
    movb $'a', %bl
write:                          # a slot, then the record
    movw count, %ax
    andw $63, %ax
    shlw $4, %ax
    addw $2048, %ax
    movw %ax, packet+8
    movb $0x43, %ah
    call disk
    movw $2047, packet+8
    movb $0x43, %ah
    call disk
    movw $newline, tail
    movw $wrote, %si
    call tell
    incb %bl
    cmpb $'b', %bl
    jbe write
    jmp wait
off:
    movw $ok, tail
    movb $'a', %bl
say_last:
    movw $last, %si
    call tell
    incb %bl
    cmpb $'b', %bl
    jbe say_last
    movw $0x604, %dx            # ACPI: soft off
    movw $0x2000, %ax
    outw %ax, %dx
halt:
    hlt
    jmp halt

disk:                           # BIOS function %ah on disk %bl, one sector
    movb %bl, %dl
    addb $(0x80-'a'), %dl
    xorb %al, %al
    movw $packet, %si
    pushw %bx
    int $0x13
    popw %bx
    jnc return
    movw $fail, %si
    jmp print

tell:                           # "FAILBACK", the word at %si, the disk %bl, the count, the tail
    pushw %si
    movw $head, %si
    call print
    popw %si
    call print
    movb %bl, name+3
    movw $name, %si
    call print
    movl count, %eax
    movw $digits+5, %di
    movw $6, %cx
digit:
    xorl %edx, %edx
    movl $10, %esi
    divl %esi
    addb $'0', %dl
    movb %dl, (%di)
    decw %di
    loop digit
    movw $digits, %si
    call print
    movw tail, %si
print:
    lodsb
    testb %al, %al
    jz return
    movw $0x3f8, %dx
    outb %al, %dx
    jmp print
return:
    ret

head: .asciz "FAILBACK "
found: .asciz "FOUND"
wrote: .asciz "WROTE"
last: .asciz "LAST"
name: .asciz " vda "
digits: .asciz "000000"
ok: .ascii " ok"
newline: .asciz "\n"
ready: .asciz "FAILBACK READY\n"
fail: .asciz "FAILBACK FAIL io\n"
tail: .word ok
ticks: .byte 4
.balign 4
count: .long 0
packet: .byte 16, 0             # disk address packet: one sector, segment filled in at the start
    .word 1, sector, 0
    .quad 2047
role: .byte 1                   # the last byte: 1 writes, 0 only reads
.org 0x400
.set sector, 0x600
