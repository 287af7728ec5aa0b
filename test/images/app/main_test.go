package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// asApp makes the test's executable the program itself.
const asApp = "APP_TEST_RUN_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asApp) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func app(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asApp+"=1")
	return cmd
}

// A command that fails must be seen to fail: tests of pods rest on it.
func TestExitCodes(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"env"}, 0},
		{[]string{"sleep", "1ms"}, 0},
		{[]string{"crash", "7"}, 7},
		{[]string{"crash", "0"}, 0},
		{[]string{"cat", none}, 1},
		{[]string{"sleep", "long"}, 1},
		{[]string{"get", "http://" + free(t, "tcp") + "/", "1", "1s"}, 1},
		{[]string{"tcp", free(t, "tcp")}, 1},
		{[]string{"no-such-command"}, 2},
	} {
		cmd := app(c.args...)
		out, _ := cmd.CombinedOutput() // the code is what is looked at
		if got := cmd.ProcessState.ExitCode(); got != c.code {
			t.Errorf("%q: exit code %d, want %d\n%s", c.args, got, c.code, out)
		}
	}
}

// A command that is told to end ends well, however its work came out.
func TestTerminatedIsNoFailure(t *testing.T) {
	cmd := app("print", "100000", "20ms")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() }).Stop()
	if _, err := out.Read(make([]byte, 1)); err != nil { // it handles signals by now
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v, want exit code 0", err)
	}
}
