package lockfile

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "hold" {
		_, err := Acquire(os.Args[2])
		fmt.Println(err)
		select {}
	}
	os.Exit(m.Run())
}

// The lock is between processes, so another one holds it here, and is killed.
func TestHolderDiesWithItsLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if pid, err := Holder(path); pid != 0 || err != nil {
		t.Errorf("without a file: %d, %v", pid, err)
	}
	cmd := exec.Command("/proc/self/exe", "hold", path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "<nil>\n" {
		t.Fatalf("other process: %q, %v", line, err)
	}
	if pid, err := Holder(path); pid != cmd.Process.Pid || err != nil {
		t.Errorf("holder %d, %v; want %d", pid, err, cmd.Process.Pid)
	}
	if _, err := Acquire(path); !errors.Is(err, ErrHeld) {
		t.Errorf("acquired a held lock: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if pid, err := Holder(path); pid != 0 || err != nil {
		t.Errorf("after its death: holder %d, %v", pid, err)
	}
	l, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
