package daemon

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestDiskStages(t *testing.T) {
	var d disk
	log := slog.New(slog.DiscardHandler)
	for _, c := range []struct {
		free      uint64
		full, end bool
	}{
		{1 << 30, false, false},
		{spaceToWrite, false, false},
		{spaceToWrite - 1, true, false},
		{spaceToRun, true, false},
		{spaceToWrite, false, false}, // there is room again
		{spaceToRun - 1, false, true},
		{0, false, true},
	} {
		err := d.look(log, "/var/lib/skein", c.free)
		if (d.err() != nil) != c.full || (err != nil) != c.end {
			t.Errorf("%d bytes free: full %v, end %v; want %v and %v", c.free, d.err(), err, c.full, c.end)
		}
		for _, e := range []error{err, d.err()} {
			if e != nil && (!errors.Is(e, errNoSpace) || !strings.Contains(e.Error(), "/var/lib/skein")) {
				t.Errorf("%d bytes free: %v does not say what is full", c.free, e)
			}
		}
	}
}

// The state directory need not exist when its space is asked for.
func TestFreeSpaceOfNothing(t *testing.T) {
	dir := t.TempDir()
	a, err := freeSpace(filepath.Join(dir, "not", "yet"))
	if err != nil || a == 0 {
		t.Fatalf("%d, %v", a, err)
	}
}

func TestPortFree(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for network, a := range map[string]net.Addr{"tcp": l.Addr(), "udp": u.LocalAddr()} {
		busy := netip.MustParseAddrPort(a.String())
		if err := portFree(network, busy); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%s %s: %v, want that it is taken", network, busy, err)
		}
	}
	// The address of the DNS server is on no interface before the first start.
	if err := portFree("udp", netip.MustParseAddrPort("192.0.2.1:40053")); err != nil {
		t.Errorf("an address that is still to be made: %v", err)
	}
}

func TestPreflightLeavesNothing(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	cfg := Config{Name: "n1", StateDir: state, Helper: filepath.Join(state, "no-helper")}
	cfg.setDefaults()
	err := preflight(t.Context(), cfg) // no address either
	if err == nil {
		t.Fatal("a node without helper and address may start")
	}
	if os.Geteuid() == 0 && (!strings.Contains(err.Error(), "no-helper") || !strings.Contains(err.Error(), "--address")) {
		t.Errorf("not all faults at once: %v", err)
	}
	if _, err := os.Stat(state); err == nil {
		t.Error("the state directory was made")
	}
}
