// Command workload is the program of the test containers: "exit FILE CODE" ends with CODE once FILE is there, "eat FILE" takes 1 GiB then.
package main

import (
	"os"
	"runtime"
	"strconv"
	"time"
)

func main() {
	for {
		if _, err := os.Stat(os.Args[2]); err == nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	switch os.Args[1] {
	case "exit":
		code, err := strconv.Atoi(os.Args[3])
		if err != nil {
			panic(err)
		}
		os.Exit(code)
	case "eat":
		var keep [][]byte
		for range 1024 {
			b := make([]byte, 1<<20)
			for j := 0; j < len(b); j += 4096 {
				b[j] = 1
			}
			keep = append(keep, b)
		}
		runtime.KeepAlive(keep)
	}
}
