PRAGMA application_id=1178757937;
PRAGMA user_version=1;
BEGIN TRANSACTION;
CREATE TABLE hosts (
	name TEXT NOT NULL, 
	fingerprint VARCHAR(64) NOT NULL, 
	software TEXT NOT NULL, 
	bulk_port INTEGER NOT NULL, 
	seen_s FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "hosts" VALUES('prod','fingerprint-prod','failback 0',9861,1700000004.0);
INSERT INTO "hosts" VALUES('dr','fingerprint-dr','failback 0',9861,1700000004.0);
CREATE TABLE journal (
	seq INTEGER NOT NULL, 
	pair VARCHAR(63) NOT NULL, 
	run VARCHAR(64) NOT NULL, 
	epoch INTEGER NOT NULL, 
	at_s FLOAT NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	phase VARCHAR(8) NOT NULL, 
	step TEXT NOT NULL, 
	actor TEXT NOT NULL, 
	sentence TEXT NOT NULL, 
	elapsed_s FLOAT, 
	result TEXT, 
	PRIMARY KEY (seq), 
	FOREIGN KEY(pair) REFERENCES pairs (name)
);
INSERT INTO "journal" VALUES(1,'web','',0,1700000000.0,'state','do','Ready','root@test','registered',NULL,NULL);
INSERT INTO "journal" VALUES(2,'web','',1,1700000000.0,'state','do','Failover','root@test','the replica took over',NULL,NULL);
INSERT INTO "journal" VALUES(3,'web','r0000000001',2,1700000001.0,'state','do','Syncing','root@test','',NULL,NULL);
INSERT INTO "journal" VALUES(4,'web','r0000000001',3,1700000003.0,'intent','do','survey','root@test','look at both VMs and their hosts',NULL,NULL);
INSERT INTO "journal" VALUES(5,'web','r0000000001',3,1700000005.0,'done','do','survey','root@test','',1.0,'{"original_power":"off","replica_power":"running","original_fingerprint":"fingerprint-prod","replica_fingerprint":"fingerprint-dr","bulk_port":9861,"disks":[{"original":"vda","replica":"vda","source_size_bytes":1048576,"target_size_bytes":1048576,"source_format":"raw"},{"original":"vdb","replica":"vdb","source_size_bytes":1048576,"target_size_bytes":1048576,"source_format":"raw"}]}');
INSERT INTO "journal" VALUES(6,'web','r0000000001',3,1700000006.0,'intent','do','hold_replication','root@test','put replication of the pair on hold',NULL,NULL);
INSERT INTO "journal" VALUES(7,'web','r0000000001',3,1700000007.0,'done','do','hold_replication','root@test','',1.0,'{"names":[]}');
INSERT INTO "journal" VALUES(8,'web','r0000000001',3,1700000008.0,'intent','do','original_off','root@test','make sure the original is off',NULL,NULL);
INSERT INTO "journal" VALUES(9,'web','r0000000001',3,1700000009.0,'done','do','original_off','root@test','',1.0,'{"was_running":false,"forced":false,"guest_s":0.0,"killed":false}');
INSERT INTO "journal" VALUES(10,'web','r0000000001',3,1700000010.0,'intent','do','fence_original','root@test','fence the original: autostart off, images locked',NULL,NULL);
INSERT INTO "journal" VALUES(11,'web','r0000000001',3,1700000011.0,'done','do','fence_original','root@test','',1.0,'{"autostart_before":true,"condition":"intact","view":null}');
INSERT INTO "journal" VALUES(12,'web','r0000000001',3,1700000012.0,'intent','do','tracking','root@test','clear what earlier runs recorded of the replica''s writes',NULL,NULL);
INSERT INTO "journal" VALUES(13,'web','r0000000001',3,1700000013.0,'done','do','tracking','root@test','',1.0,'{}');
INSERT INTO "journal" VALUES(14,'web','r0000000001',3,1700000014.0,'intent','do','open_view:1','root@test','freeze the first view of the running replica',NULL,NULL);
INSERT INTO "journal" VALUES(15,'web','r0000000001',3,1700000015.0,'done','do','open_view:1','root@test','',2.0,'{"view":"r0000000001-1","live":true,"disks":[{"target":"vda","size_bytes":1048576,"tracked":true,"since":null,"why_not":"nothing was asked since any view"},{"target":"vdb","size_bytes":1048576,"tracked":true,"since":null,"why_not":"nothing was asked since any view"}],"opened_s":111.0}');
INSERT INTO "journal" VALUES(16,'web','r0000000001',3,1700000016.0,'intent','do','pass:1','root@test','first pass: bring the original up to the view',NULL,NULL);
INSERT INTO "journal" VALUES(17,'web','r0000000001',3,1700000018.0,'done','do','pass:1','root@test','',3.0,'{"view":"r0000000001-1","source":{"view":"r0000000001-1","elapsed_s":1.0,"disks":[{"target":"vda","size_bytes":1048576,"zero_bytes":262144,"compared_bytes":786432,"changed_bytes":4096,"wire_bytes":1000,"written_bytes":0,"zeroed_bytes":0,"verified_bytes":0,"rung":"digests","why_not_higher":"no bitmap","past_cache":true,"frames":{"zstd 1":1},"stored_bytes":900,"lanes":1,"superblock_bytes":1048576,"detail_bytes":4096,"access":"raw","differing_bytes":0,"differing":[],"unchanged_bytes":0},{"target":"vdb","size_bytes":1048576,"zero_bytes":262144,"compared_bytes":786432,"changed_bytes":4096,"wire_bytes":1000,"written_bytes":0,"zeroed_bytes":0,"verified_bytes":0,"rung":"digests","why_not_higher":"no bitmap","past_cache":true,"frames":{"zstd 1":1},"stored_bytes":900,"lanes":1,"superblock_bytes":1048576,"detail_bytes":4096,"access":"raw","differing_bytes":0,"differing":[],"unchanged_bytes":0}]},"target":{"view":"r0000000001-1","elapsed_s":1.0,"disks":[{"target":"vda","size_bytes":1048576,"zero_bytes":0,"compared_bytes":786432,"changed_bytes":0,"wire_bytes":0,"written_bytes":4096,"zeroed_bytes":512,"verified_bytes":4608,"rung":"digests","why_not_higher":"no bitmap","past_cache":true,"frames":{},"stored_bytes":0,"lanes":1,"superblock_bytes":0,"detail_bytes":0,"access":"raw","differing_bytes":0,"differing":[],"unchanged_bytes":0},{"target":"vdb","size_bytes":1048576,"zero_bytes":0,"compared_bytes":786432,"changed_bytes":0,"wire_bytes":0,"written_bytes":4096,"zeroed_bytes":512,"verified_bytes":4608,"rung":"digests","why_not_higher":"no bitmap","past_cache":true,"frames":{},"stored_bytes":0,"lanes":1,"superblock_bytes":0,"detail_bytes":0,"access":"raw","differing_bytes":0,"differing":[],"unchanged_bytes":0}]},"evidence":[{"original":"vda","replica":"vda","rung":"digests","since":null,"map_seed":null,"why_not_higher":"no pass was complete"},{"original":"vdb","replica":"vdb","rung":"digests","since":null,"map_seed":null,"why_not_higher":"no pass was complete"}]}');
INSERT INTO "journal" VALUES(18,'web','r0000000001',3,1700000019.0,'intent','do','close_view:1','root@test','close the view',NULL,NULL);
INSERT INTO "journal" VALUES(19,'web','r0000000001',3,1700000020.0,'done','do','close_view:1','root@test','',1.0,'{"view":"r0000000001-1","live":false,"disks":[],"opened_s":0.0}');
INSERT INTO "journal" VALUES(20,'web','r0000000001',3,1700000021.0,'intent','do','drop_checkpoints:1','root@test','drop the records that nobody needs any more',NULL,NULL);
INSERT INTO "journal" VALUES(21,'web','r0000000001',3,1700000022.0,'done','do','drop_checkpoints:1','root@test','',1.0,'{"kept":["r0000000001-1"]}');
INSERT INTO "journal" VALUES(22,'web','r0000000001',3,1700000023.0,'note','do','predicted','root@test','round 1 (vda digests, vdb digests): how fast the guest writes is not known yet; about 15.8 s of downtime are expected',NULL,'{"guest_s":10.0,"guest_seen":false,"fixed_s":5.499999999999999,"fixed_measured":true,"pass_s":0.30065536,"delta_bytes":65536,"read_bytes":65536,"whole":[],"dirty_bytes_s":null,"copy_bytes_s":100000000.0}');
INSERT INTO "journal" VALUES(23,'web','r0000000001',3,1700000024.0,'intent','do','open_view:2','root@test','freeze the second view of the running replica',NULL,NULL);
INSERT INTO "journal" VALUES(24,'web','r0000000001',3,1700000025.0,'done','do','open_view:2','root@test','',2.0,'{"view":"r0000000001-2","live":true,"disks":[{"target":"vda","size_bytes":1048576,"tracked":true,"since":"r0000000001-1","why_not":""},{"target":"vdb","size_bytes":1048576,"tracked":true,"since":"r0000000001-1","why_not":""}],"opened_s":123.0}');
INSERT INTO "journal" VALUES(25,'web','r0000000001',3,1700000026.0,'intent','do','pass:2','root@test','second pass: bring the original up to the view',NULL,NULL);
INSERT INTO "journal" VALUES(26,'web','r0000000001',3,1700000028.0,'done','do','pass:2','root@test','',3.0,'{"view":"r0000000001-2","source":{"view":"r0000000001-2","elapsed_s":1.0,"disks":[{"target":"vda","size_bytes":1048576,"zero_bytes":0,"compared_bytes":65536,"changed_bytes":4096,"wire_bytes":1000,"written_bytes":0,"zeroed_bytes":0,"verified_bytes":0,"rung":"bitmap","why_not_higher":"","past_cache":true,"frames":{"zstd 1":1},"stored_bytes":900,"lanes":1,"superblock_bytes":1048576,"detail_bytes":4096,"access":"raw","differing_bytes":0,"differing":[],"unchanged_bytes":983040},{"target":"vdb","size_bytes":1048576,"zero_bytes":0,"compared_bytes":65536,"changed_bytes":4096,"wire_bytes":1000,"written_bytes":0,"zeroed_bytes":0,"verified_bytes":0,"rung":"bitmap","why_not_higher":"","past_cache":true,"frames":{"zstd 1":1},"stored_bytes":900,"lanes":1,"superblock_bytes":1048576,"detail_bytes":4096,"access":"raw","differing_bytes":0,"differing":[],"unchanged_bytes":983040}]},"target":{"view":"r0000000001-2","elapsed_s":1.0,"disks":[{"target":"vda","size_bytes":1048576,"zero_bytes":0,"compared_bytes":786432,"changed_bytes":0,"wire_bytes":0,"written_bytes":4096,"zeroed_bytes":512,"verified_bytes":4608,"rung":"bitmap","why_not_higher":"","past_cache":true,"frames":{},"stored_bytes":0,"lanes":1,"superblock_bytes":0,"detail_bytes":0,"access":"raw","differing_bytes":0,"differing":[],"unchanged_bytes":983040},{"target":"vdb","size_bytes":1048576,"zero_bytes":0,"compared_bytes":786432,"changed_bytes":0,"wire_bytes":0,"written_bytes":4096,"zeroed_bytes":512,"verified_bytes":4608,"rung":"bitmap","why_not_higher":"","past_cache":true,"frames":{},"stored_bytes":0,"lanes":1,"superblock_bytes":0,"detail_bytes":0,"access":"raw","differing_bytes":0,"differing":[],"unchanged_bytes":983040}]},"evidence":[{"original":"vda","replica":"vda","rung":"overlay","since":"r0000000001-1","map_seed":1000,"why_not_higher":""},{"original":"vdb","replica":"vdb","rung":"overlay","since":"r0000000001-1","map_seed":1001,"why_not_higher":""}]}');
INSERT INTO "journal" VALUES(27,'web','r0000000001',3,1700000029.0,'intent','do','close_view:2','root@test','close the view',NULL,NULL);
INSERT INTO "journal" VALUES(28,'web','r0000000001',3,1700000030.0,'done','do','close_view:2','root@test','',1.0,'{"view":"r0000000001-2","live":false,"disks":[],"opened_s":0.0}');
INSERT INTO "journal" VALUES(29,'web','r0000000001',3,1700000031.0,'intent','do','drop_checkpoints:2','root@test','drop the records that nobody needs any more',NULL,NULL);
INSERT INTO "journal" VALUES(30,'web','r0000000001',3,1700000032.0,'done','do','drop_checkpoints:2','root@test','',1.0,'{"kept":["r0000000001-2"]}');
INSERT INTO "journal" VALUES(31,'web','r0000000001',3,1700000033.0,'note','do','predicted','root@test','round 2 (vda overlay, vdb overlay): 0.1 MiB are left, the guest writes 0.0 MiB/s; about 16.5 s of downtime are expected',NULL,'{"guest_s":10.0,"guest_seen":false,"fixed_s":5.499999999999999,"fixed_measured":true,"pass_s":1.00065536,"delta_bytes":65536,"read_bytes":65536,"whole":[],"dirty_bytes_s":10922.666666666666,"copy_bytes_s":100000000.0}');
INSERT INTO "journal" VALUES(32,'web','r0000000001',3,1700000034.0,'state','do','Ready to switch','root@test','the downtime would be about 16.5 s',NULL,NULL);
INSERT INTO "journal" VALUES(33,'web','r0000000001',3,1700000036.0,'note','do','predicted','root@test','about 16.5 s of downtime are expected',NULL,'{"guest_s":10.0,"guest_seen":false,"fixed_s":5.499999999999999,"fixed_measured":true,"pass_s":1.00065536,"delta_bytes":65536,"read_bytes":65536,"whole":[],"dirty_bytes_s":10922.666666666666,"copy_bytes_s":100000000.0}');
INSERT INTO "journal" VALUES(34,'web','r0000000001',3,1700000037.0,'state','do','Switching','root@test','the downtime would be about 16.5 s',NULL,NULL);
INSERT INTO "journal" VALUES(35,'web','r0000000001',3,1700000038.0,'intent','do','replica_off','root@test','power the replica off',NULL,NULL);
INSERT INTO "journal" VALUES(36,'web','r0000000001',3,1700000039.0,'done','do','replica_off','root@test','',1.0,'{"was_running":true,"forced":false,"guest_s":1.0,"killed":false}');
INSERT INTO "journal" VALUES(37,'web','r0000000001',3,1700000040.0,'intent','do','prove_replica_off','root@test','prove that the replica is off',NULL,NULL);
INSERT INTO "journal" VALUES(38,'web','r0000000001',3,1700000041.0,'done','do','prove_replica_off','root@test','',1.0,'{}');
INSERT INTO "journal" VALUES(39,'web','r0000000001',3,1700000042.0,'intent','do','fence_replica','root@test','fence the replica: autostart off, images locked',NULL,NULL);
INSERT INTO "journal" VALUES(40,'web','r0000000001',3,1700000043.0,'done','do','fence_replica','root@test','',1.0,'{"autostart_before":true,"condition":"intact","view":null}');
CREATE TABLE pairs (
	name VARCHAR(63) NOT NULL, 
	original TEXT NOT NULL, 
	replica TEXT NOT NULL, 
	disks TEXT NOT NULL, 
	excluded TEXT NOT NULL, 
	state VARCHAR(32) NOT NULL, 
	newest VARCHAR(16) NOT NULL, 
	condition VARCHAR(16) NOT NULL, 
	condition_view TEXT, 
	epoch INTEGER NOT NULL, 
	run VARCHAR(64), 
	original_autostart BOOLEAN, 
	operator TEXT, 
	PRIMARY KEY (name)
);
INSERT INTO "pairs" VALUES('web','{"host":"prod","name":"web","uuid":"u-orig"}','{"host":"dr","name":"web","uuid":"u-repl"}','[{"original":"vda","replica":"vda"},{"original":"vdb","replica":"vdb"}]','[]','Switching','replica','equals-view','r0000000001-2',3,'r0000000001',1,NULL);
CREATE TABLE progress (
	pair VARCHAR(63) NOT NULL, 
	run VARCHAR(64) NOT NULL, 
	snapshot TEXT NOT NULL, 
	PRIMARY KEY (pair), 
	FOREIGN KEY(pair) REFERENCES pairs (name)
);
CREATE TABLE requests (
	id INTEGER NOT NULL, 
	pair VARCHAR(63) NOT NULL, 
	run VARCHAR(64) NOT NULL, 
	verb VARCHAR(16) NOT NULL, 
	actor TEXT NOT NULL, 
	asked_s FLOAT NOT NULL, 
	claimed BOOLEAN NOT NULL, 
	answer TEXT, 
	PRIMARY KEY (id), 
	FOREIGN KEY(pair) REFERENCES pairs (name)
);
CREATE TABLE runs (
	id VARCHAR(64) NOT NULL, 
	pair VARCHAR(63) NOT NULL, 
	options TEXT NOT NULL, 
	actor TEXT NOT NULL, 
	started_s FLOAT NOT NULL, 
	ended_s FLOAT, 
	outcome VARCHAR(32), 
	reason TEXT NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(pair) REFERENCES pairs (name)
);
INSERT INTO "runs" VALUES('r0000000001','web','{"power_on":true,"power_off_original":false,"shutdown_timeout_s":900.0,"shutdown_policy":"abort","kill_after_s":60.0,"allow_larger_target":false,"limits":{"network_bytes_s":null,"read_bytes_s":null},"switch":"auto","switch_at_s":null,"max_downtime_s":null,"background_s":300.0,"late_evidence":"return","track":"bitmap","freeze_guest":false,"verify_full":false,"audit":true,"discard_divergence":false}','root@test',1700000001.0,NULL,NULL,'');
CREATE INDEX journal_by_run ON journal (pair, run, seq);
COMMIT;
